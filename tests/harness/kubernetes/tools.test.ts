import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { findToolModule, toolKey, type ToolModule } from './tools.ts';

/** A module without dependencies: the build is real, and takes a second. */
const hello: ToolModule = {
  name: 'hello',
  versionOf: 'example.org/dependency',
  programs: { hello: '.' },
  links: ['greet'],
  variables: (version) => ({ 'main.version': version }),
  durationText: 'a second',
};

let directory: string;
let source: string;
const lines: string[] = [];
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'mimo-tools-'));
  source = join(directory, 'source');
  mkdirSync(source);
  mkdirSync(join(directory, 'bin'));
  writeFileSync(
    join(source, 'go.mod'),
    'module example.org/hello\n\ngo 1.26.0\n\nrequire example.org/dependency v1.2.3\n',
  );
  writeFileSync(join(source, 'main.go'), 'package main\n\nfunc main() {}\n');
  lines.length = 0;
});
afterEach(() => rmSync(directory, { recursive: true }));

/** Puts a program in the place of `go`. */
function writeGo(script: string): void {
  writeFileSync(join(directory, 'bin/go'), `#!/bin/sh\n${script}\n`);
  chmodSync(join(directory, 'bin/go'), 0o755);
}

const find = async (path = `${join(directory, 'bin')}:/bin:/usr/bin`): Promise<string> =>
  findToolModule(
    hello,
    {
      cacheDirectory: join(directory, 'cache'),
      onProgress: (line) => lines.push(line),
      signal: new AbortController().signal,
      env: { ...process.env, PATH: path },
    },
    source,
  );

describe('toolKey', () => {
  it('names the module, its version and a digest', async () => {
    expect(await toolKey(hello, source)).toMatch(/^hello-v1\.2\.3-[0-9a-f]{12}$/);
  });

  it('changes with every source and every flag, and with nothing else', async () => {
    const key = await toolKey(hello, source);
    const copy = join(directory, 'copy');
    cpSync(source, copy, { recursive: true });
    expect(await toolKey(hello, copy)).toBe(key);
    writeFileSync(join(copy, 'go.sum'), 'example.org/dependency v1.2.3 h1:abc=\n');
    const keys = [
      key,
      await toolKey(hello, copy),
      await toolKey({ ...hello, links: [] }, source),
      await toolKey({ ...hello, variables: () => ({}) }, source),
    ];
    expect(new Set(keys).size).toBe(keys.length);
  });

  it('refuses a module that does not name the version', async () => {
    await expect(toolKey({ ...hello, versionOf: 'example.org/other' }, source)).rejects.toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('example.org/other'),
    });
  });
});

describe('findToolModule', () => {
  it('builds once for all callers, with the flags, and leaves only programs and links behind', async () => {
    writeGo(`[ "$3" = env ] && exit 0
echo "$@" >> ${directory}/builds; sleep 0.3; echo "#!/bin/sh" > "$7"; chmod +x "$7"`);
    const [first, second] = await Promise.all([find(), find()]);
    expect(first).toBe(second);
    expect(await find()).toBe(first);
    expect(readdirSync(first).toSorted()).toEqual(['greet', 'hello']);
    expect(readdirSync(join(directory, 'cache/kubernetes'))).toEqual([await toolKey(hello, source)]);
    expect(readFileSync(join(directory, 'builds'), 'utf8')).toMatch(
      /^-C \S+\/source build -v -ldflags=-s -w -X main\.version=v1\.2\.3 -o \S+\/bin\/hello \.\n$/,
    );
    expect(lines.filter((line) => line.startsWith('building'))).toEqual([
      'building hello v1.2.3 from Go modules, once: a second',
    ]);
  });

  it('says what to do when Go is missing', async () => {
    symlinkSync('/bin/sh', join(directory, 'bin/sh'));
    await expect(find(join(directory, 'bin'))).rejects.toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(/Go 1\.26 or later[^]*Install it[^]*not found/),
    });
    expect(readdirSync(join(directory, 'cache/kubernetes'))).toEqual([]);
  });

  it("reports Go's own message when it is too old or a build fails", async () => {
    writeGo('echo "go: go.mod requires go >= 1.26.0 (running go 1.19)" >&2; exit 1');
    await expect(find()).rejects.toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('running go 1.19'),
    });
    writeGo('[ "$3" = env ] && exit 0\necho "module lookup disabled" >&2; exit 1');
    await expect(find()).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('hello v1.2.3 cannot be built here:\nmodule lookup disabled'),
    });
    expect(existsSync(join(directory, 'cache/kubernetes', await toolKey(hello, source)))).toBe(false);
  });

  it('retries a build that may have failed at a download, but not a source that does not compile', async () => {
    const attempts = (): number => readFileSync(join(directory, 'attempts'), 'utf8').length;
    const attempt = `[ "$3" = env ] && exit 0\nprintf x >> ${directory}/attempts`;
    writeGo(`${attempt}\necho "main.go:3:1: syntax error" >&2; exit 1`);
    await expect(find()).rejects.toMatchObject({ message: expect.stringContaining('syntax error') });
    expect(attempts()).toBe(1);
    expect(lines.filter((line) => line.startsWith('attempt'))).toEqual([]);

    writeGo(`${attempt}
[ "$(wc -c < ${directory}/attempts)" -lt 4 ] && echo "unexpected EOF" >&2 && exit 1
echo "#!/bin/sh" > "$7"`);
    expect(readdirSync(await find()).toSorted()).toEqual(['greet', 'hello']);
    expect(attempts()).toBe(4);
    expect(lines.filter((line) => line.startsWith('attempt'))).toEqual([
      'attempt 1 of 3 to build hello v1.2.3 failed:\nunexpected EOF',
      'attempt 2 of 3 to build hello v1.2.3 failed:\nunexpected EOF',
    ]);
  });
});
