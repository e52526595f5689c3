// Kubernetes quantities, of the form that the resources allow: a decimal number and one unit.

const units: Readonly<Record<string, number>> = {
  '': 1,
  m: 1e-3,
  k: 1e3,
  M: 1e6,
  G: 1e9,
  T: 1e12,
  Ki: 2 ** 10,
  Mi: 2 ** 20,
  Gi: 2 ** 30,
  Ti: 2 ** 40,
};

/** The amount in base units: bytes, or CPUs. NaN for a text of another form. */
export function amountOf(quantity: string): number {
  const [, count, unit] = /^(\d+(?:\.\d+)?)(m|[kMGT]|[KMGT]i)?$/.exec(quantity) ?? [];
  return count === undefined ? Number.NaN : Number(count) * (units[unit ?? ''] ?? Number.NaN);
}
