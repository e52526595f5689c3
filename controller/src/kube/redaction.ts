// What the API server, an admission policy or a proxy says of a request may quote it. Owns which parts of a request no
// error may repeat: its credentials, a Secret whole, and the values of environment variables.

import type { ApiStatus } from './api-status.ts';

/** Shorter values of variables are numbers, words and names of things; to blank them out would blank out the text. */
const secretMinLength = 8;

/** The status without what the request keeps secret; its code and reason stay. */
export function redactStatus(
  status: ApiStatus,
  { body, credentials }: { readonly body?: unknown; readonly credentials: readonly string[] },
): ApiStatus {
  if (isSecret(body)) {
    const { code, reason } = status;
    return { code, message: `${reason ?? `HTTP ${code}`} (more is withheld, it may quote the Secret)` };
  }
  const redacted = [...valuesOfVariables(body), ...credentials]
    .filter((secret) => secret.length >= secretMinLength)
    .reduce((text, secret) => text.replaceAll(inJson(secret), '***'), JSON.stringify(status));
  return JSON.parse(redacted) as ApiStatus;
}

function isSecret(body: unknown): boolean {
  return typeof body === 'object' && body !== null && 'kind' in body && body.kind === 'Secret';
}

/** Of all containers; not those that stand elsewhere in the object too, such as its name. */
function valuesOfVariables(body: unknown): string[] {
  const values: string[] = [];
  const rest = JSON.stringify(body ?? null, (key, value: unknown) => {
    if (key !== 'env' || !Array.isArray(value)) {
      return value;
    }
    const variables = value as readonly { readonly value?: unknown }[];
    values.push(...variables.map((variable) => variable.value).filter((text) => typeof text === 'string'));
    return undefined;
  });
  return values.filter((value) => !rest.includes(inJson(value)));
}

function inJson(text: string): string {
  return JSON.stringify(text).slice(1, -1);
}
