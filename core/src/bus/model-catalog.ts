// The models of the cluster, and the small files of each that a gateway needs: tokenizer and configuration, never
// weights. Implemented by nats/model-catalog.ts alone: a bus in memory has no catalogue, since its one process reads
// the directories of its configuration. Does not know what the files mean.

/** A model as it is published: 1 to 16 files by their plain names, 64 MiB together. */
export interface ModelFiles {
  readonly name: string;
  readonly files: ReadonlyMap<string, Uint8Array>;
  /** The identity of the groups that shall run it (model-identity.ts); empty if unknown. */
  readonly identity: string;
}

/** A model of the catalogue. A different digest means different content. */
export interface CatalogModel {
  readonly name: string;
  /** SHA-256 of the files' names, sizes and digests, and of the identity; hex. */
  readonly digest: string;
  readonly identity: string;
  /** False: the store lost it, and nobody has published it again or removed it since. */
  readonly isStored: boolean;
}

/**
 * The catalogue. Methods wait for the server until their signal fires, and fail with `unavailable` if it does not
 * answer. Iterations end when their signal fires or the connection is closed.
 */
export interface ModelCatalog {
  /**
   * Adds a model or replaces its files, atomically; equal files are left as they are. Fails with `invalid_argument`
   * if names or sizes are out of bounds, `aborted` if other writers of the model kept winning, `resource_exhausted`
   * if the store is full.
   */
  publish(model: ModelFiles, signal: AbortSignal): Promise<CatalogModel>;
  /**
   * Publishes the files that `fetch` wrote into a directory again, unchanged. An entry of the model in the store
   * takes precedence. Fails with `data_loss` if the files do not match the digest.
   */
  restore(model: CatalogModel, directory: string, signal: AbortSignal): Promise<void>;
  /** Removes a model, even one that the store lost, so that followers forget it. */
  remove(name: string, signal: AbortSignal): Promise<void>;
  /**
   * The whole set, ordered by name: once at the start, and again within about a second of a change. If the store is
   * deleted, emptied or lost, known models stay, marked as not stored, until somebody publishes them again or removes
   * them. Only a process with the files can publish again; a new follower does not know these models.
   */
  follow(signal: AbortSignal): AsyncIterable<readonly CatalogModel[]>;
  /**
   * Writes a model's files into a directory that appears complete or not at all; an existing directory counts as
   * complete. Fails with `not_found` if the catalogue has no (or no longer a) model of this name and digest,
   * `data_loss` if the files do not match their digests.
   */
  fetch(model: Pick<CatalogModel, 'name' | 'digest'>, directory: string, signal: AbortSignal): Promise<void>;
}
