// Every NATS name of the cluster. A subject's token may not hold '.', '*', '>' or spaces, and model names hold '/' and
// '.': such characters are written as '=' and two hex digits of each UTF-8 byte, which key-value keys allow too.

/**
 * The stream of the records of accepted requests, and the buckets of the dispatchers' leases and of the drain marks.
 */
export const requestStream = 'REQUESTS';
export const leaseBucket = 'DISPATCHERS';
export const drainBucket = 'GROUPS';

/** Subjects for test writes to a stream: nobody follows them, and no encoded name equals them. */
export const trialSubjects = {
  [requestStream]: 'requests.trial',
  [`KV_${leaseBucket}`]: `$KV.${leaseBucket}.=trial`,
  [`KV_${drainBucket}`]: `$KV.${drainBucket}.=trial`,
} as const;

/** The object store of the model catalogue, and a second one for test writes. */
export const modelBucket = 'MODELS';
export const trialModelBucket = 'MODELS_TRIAL';

/** The subject of test writes to the store of models: not part of any model. */
export const modelTrialSubject = `$O.${modelBucket}.C.=trial`;

/** Writes a name as one subject token; `nameFromToken` reads it back. Injective; empty names throw a RangeError. */
export function tokenFromName(name: string): string {
  if (name === '') {
    throw new RangeError('an empty name cannot be a subject token');
  }
  let token = '';
  for (const byte of Buffer.from(name)) {
    const character = String.fromCharCode(byte);
    token += /[A-Za-z0-9_-]/.test(character) ? character : `=${byte.toString(16).padStart(2, '0')}`;
  }
  return token;
}

/** Reads a name back from a subject token. */
export function nameFromToken(token: string): string {
  const bytes: number[] = [];
  for (let at = 0; at < token.length; at++) {
    if (token[at] === '=') {
      bytes.push(Number.parseInt(token.slice(at + 1, at + 3), 16));
      at += 2;
    } else {
      bytes.push(token.charCodeAt(at));
    }
  }
  return Buffer.from(bytes).toString();
}

/** The subjects, by what they carry. Names are encoded here and nowhere else. */
export const subjects = {
  allRequests: 'requests.>',
  requestsOf: (model: string): string => `requests.${tokenFromName(model)}.*`,
  /** A request by its id alone, whatever its model. */
  requestById: (requestId: string): string => `requests.*.${tokenFromName(requestId)}`,
  request: (model: string, requestId: string): string =>
    `requests.${tokenFromName(model)}.${tokenFromName(requestId)}`,
  /** Heartbeats: from the leader of a group, several times a second. */
  allHeartbeats: 'workers.*.*',
  heartbeat: (model: string, group: string): string =>
    `workers.${tokenFromName(model)}.${tokenFromName(group)}`,
  /** Assignments: from a dispatcher to the gateway that owns the request, with a reply. */
  assignments: (gatewayId: string): string => `gateways.${tokenFromName(gatewayId)}.assign`,
  /** From the gateway that was asked to cancel a request to the one that owns it, with a reply. */
  cancellations: (gatewayId: string): string => `gateways.${tokenFromName(gatewayId)}.cancel`,
  /** Announces a released lease, so that a waiting process need not poll. */
  leaseFreed: (name: string): string => `leases.${tokenFromName(name)}.freed`,
  ended: (model: string): string => `ended.${tokenFromName(model)}`,
  /** The dispatcher's view of its queue, JSON. */
  queueState: (model: string): string => `queue.${tokenFromName(model)}.state`,
} as const;
