// Unicode's composed form in time that grows with the text. Owns the one case in which the engine's own `normalize`
// takes quadratic time: it sorts a run of combining marks by insertion, half a minute for 300,000 of them, and nothing
// can interrupt it. Long runs are sorted here first, by the same rule (canonical ordering of UAX #15: stable, by
// combining class), so that it has nothing to move. The classes are derived from the engine's own results, so that the
// two agree.

/** Shorter runs are cheaper to leave to the engine. Characters of other categories have combining class 0. */
const longRun = /[\p{Mn}\p{Mc}]{64,}/gu;

/** The classes seen so far, lowest first, one mark for each; and the place of each mark's class among them. */
const classes: string[] = ['\u0334', '\u0345'];
const placeByMark = new Map<string, number | undefined>();

/** The NFC of a text, equal to `text.normalize('NFC')`. */
export function composeText(text: string): string {
  return text.replaceAll(longRun, orderMarks).normalize('NFC');
}

/** A run decomposed and in canonical order. */
function orderMarks(run: string): string {
  // One by one, since decomposing the run as a whole is what sorts it.
  const marks = Array.from(run, (mark) => Array.from(mark.normalize('NFD'))).flat();
  for (const mark of new Set(marks)) {
    learn(mark);
  }
  const ordered: string[] = [];
  let byPlace: string[][] = [];
  for (const mark of marks) {
    const place = placeByMark.get(mark);
    if (place === undefined) {
      // A mark of class 0 keeps its place, and no mark moves across it.
      ordered.push(byPlace.flat().join(''), mark);
      byPlace = [];
    } else {
      (byPlace[place] ??= []).push(mark);
    }
  }
  ordered.push(byPlace.flat().join(''));
  return ordered.join('');
}

/** Finds the place of a mark's class; a new class shifts the later ones. */
function learn(mark: string): void {
  if (placeByMark.has(mark)) {
    return;
  }
  const isMoved = classes.some((other) => goesBehind(mark, other) || goesBehind(other, mark));
  if (!isMoved) {
    placeByMark.set(mark, undefined);
    return;
  }
  const firstNotBefore = classes.findIndex((other) => !goesBehind(mark, other));
  const place = firstNotBefore < 0 ? classes.length : firstNotBefore;
  const other = classes[place];
  if (other === undefined || goesBehind(other, mark)) {
    classes.splice(place, 0, mark);
    for (const [known, at] of placeByMark) {
      if (at !== undefined && at >= place) {
        placeByMark.set(known, at + 1);
      }
    }
  }
  placeByMark.set(mark, place);
}

/** Whether canonical ordering puts the first mark after the second. */
function goesBehind(first: string, second: string): boolean {
  return (first + second).normalize('NFD') === second + first && first !== second;
}
