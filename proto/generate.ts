// Writes proto/src/gen from proto/mimo and from the standard protos that npm packages carry (gRPC health and
// reflection, google.rpc). Those are copied to proto/.vendor at each run and never committed. With a directory as its
// argument it writes below that instead.

import { execFileSync } from 'node:child_process';
import { cpSync, mkdirSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';

const root = join(import.meta.dirname, '..');
const vendor = join(root, 'proto/.vendor');

const standard: Readonly<Record<string, string>> = {
  'grpc/health/v1/health.proto': 'grpc-health-check/proto/health/v1/health.proto',
  'grpc/reflection/v1/reflection.proto': '@grpc/reflection/build/proto/grpc/reflection/v1/reflection.proto',
  'grpc/reflection/v1alpha/reflection.proto':
    '@grpc/reflection/build/proto/grpc/reflection/v1alpha/reflection.proto',
  'google/rpc/error_details.proto': 'google-proto-files/google/rpc/error_details.proto',
  'google/rpc/status.proto': 'google-proto-files/google/rpc/status.proto',
};

rmSync(vendor, { recursive: true, force: true });
for (const [target, source] of Object.entries(standard)) {
  mkdirSync(dirname(join(vendor, target)), { recursive: true });
  cpSync(join(root, 'node_modules', source), join(vendor, target));
}

const buf = (...args: string[]): void => {
  execFileSync(join(root, 'node_modules/.bin/buf'), args, { cwd: root, stdio: 'inherit' });
};
const [output = root] = process.argv.slice(2);
buf('lint');
buf('generate', '--output', output);
buf('build', '--exclude-source-info', '-o', join(output, 'proto/src/gen/descriptor.binpb'));
