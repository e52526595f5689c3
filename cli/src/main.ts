// The `mimo` command: `npm run mimo -- COMMAND`, `npm run up`, `npm run chat`. Owns the choice of the command,
// signals and the exit code: 0 for success, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C.

import { ClusterError } from '@mimo/core/process/errors';

import { note, noteError } from './terminal.ts';

interface Command {
  readonly help: string;
  readonly run: (argv: readonly string[], signal: AbortSignal) => Promise<number>;
}

// Imported on use: `chat` need not load the compiler, nor `compile` gRPC.
const commands: Readonly<Record<string, () => Promise<Command>>> = {
  up: async () => import('./up.ts').then(({ runUp, upHelp }) => ({ run: runUp, help: upHelp })),
  chat: async () => import('./chat.ts').then(({ runChat, chatHelp }) => ({ run: runChat, help: chatHelp })),
  models: async () =>
    import('./models.ts').then(({ runModels, modelsHelp }) => ({ run: runModels, help: modelsHelp })),
  compile: async () =>
    import('@mimo/worker/compiler/compile-command').then(({ runCompile, compileUsage }) => ({
      run: (argv, signal) => runCompile(argv, signal).then(() => 0),
      help: compileUsage,
    })),
};

const help = `mimo COMMAND [options]
  up       start a whole cluster on this machine
  chat     ask a question, or hold a conversation
  models   list the models of the gateway
  compile  compile a checkpoint into shards
  COMMAND --help lists the options of a command`;

function isUsageError(error: unknown): error is Error {
  return error instanceof Error && 'code' in error && String(error.code).startsWith('ERR_PARSE_ARGS');
}

async function run([name, ...argv]: readonly string[], signal: AbortSignal): Promise<number> {
  const load = commands[name ?? ''];
  if (load === undefined) {
    const isHelp = name === undefined || name === '--help' || name === 'help';
    note(isHelp ? help : `unknown command '${name}'\n${help}`);
    return isHelp ? 0 : 2;
  }
  const command = await load();
  if (argv.includes('--help')) {
    note(command.help);
    return 0;
  }
  try {
    return await command.run(argv, signal);
  } catch (error) {
    if (isUsageError(error)) {
      noteError(`${error.message}\n${command.help}`);
      return 2;
    }
    throw error;
  }
}

const stopping = new AbortController();
const interruptedCode = 130;
// One Ctrl-C can arrive twice, from the terminal and from a launcher. Only a later one means "stop at once".
const impatienceMs = 1_000;
let stoppedAt: number | undefined;
for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP', 'disconnect'] as const) {
  process.on(name, () => {
    if (stoppedAt !== undefined && performance.now() - stoppedAt > impatienceMs) {
      process.exit(interruptedCode);
    }
    stoppedAt ??= performance.now();
    stopping.abort(new ClusterError('canceled', 'interrupted'));
  });
}
// Listening for the launcher's death must not keep this process alive.
process.channel?.unref();

try {
  process.exitCode = await run(process.argv.slice(2), stopping.signal);
} catch (error) {
  const known = ClusterError.from(error);
  if (stopping.signal.aborted && known.code === 'canceled') {
    process.exitCode = interruptedCode;
  } else {
    noteError(known.message);
    for (const { field, description } of known.detail.fieldViolations ?? []) {
      note(`  ${field}: ${description}`);
    }
    process.exitCode = 1;
  }
}
