// The byte-level alphabet of GPT-2 and its heirs: how a token's bytes are spelled in a vocabulary file. Owns the table
// between the 256 bytes and 256 printable characters; knows no vocabulary.

/** The character that spells each byte in a vocabulary file, by byte. */
export const characterFromByte: readonly string[] = buildAlphabet();

const byteFromCharacter: ReadonlyMap<string, number> = new Map(
  characterFromByte.map((character, byte) => [character, byte]),
);

/**
 * The bytes that a vocabulary entry spells, or undefined when it holds a character outside the alphabet, as an added
 * token's text may.
 */
export function bytesFromSpelling(spelling: string): Uint8Array | undefined {
  const bytes = new Uint8Array(spelling.length);
  for (let i = 0; i < spelling.length; i += 1) {
    const byte = byteFromCharacter.get(spelling.charAt(i));
    if (byte === undefined) {
      return undefined;
    }
    bytes[i] = byte;
  }
  return bytes;
}

function buildAlphabet(): string[] {
  const alphabet: string[] = [];
  let moved = 0;
  for (let byte = 0; byte < 256; byte += 1) {
    if (isPrintable(byte)) {
      alphabet.push(String.fromCharCode(byte));
    } else {
      alphabet.push(String.fromCharCode(256 + moved));
      moved += 1;
    }
  }
  return alphabet;
}

/** Whether a byte is spelled as itself: Latin-1's visible characters, without the soft hyphen. */
function isPrintable(byte: number): boolean {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}
