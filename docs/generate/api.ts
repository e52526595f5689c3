// The public API, from the protos and their comments.

import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { fromBinary } from '@bufbuild/protobuf';
import {
  FieldDescriptorProto_Label as Label,
  FieldDescriptorProto_Type as Type,
  FileDescriptorSetSchema,
  type FieldDescriptorProto,
  type FileDescriptorProto,
} from '@bufbuild/protobuf/wkt';

import { code, pageOf, tableOf } from './markdown.ts';

/** Field numbers in google-proto-files/google/protobuf/descriptor.proto: a thing's path in its file. */
const inFile = { messages: 4, enums: 5, services: 6 } as const;
const memberOf = 2;

/** The page of the public API; `mimo.inference.v1` alone, the others are between our own processes. */
export function apiPage(root: string): string {
  const files = describeProtos(root).filter((file) => file.package === 'mimo.inference.v1');
  const parts = files.flatMap((file) => [
    ...file.service.map((service, index) => {
      const path = [inFile.services, index];
      const rows = service.method.map((method, at) => [
        code(method.name),
        `${method.clientStreaming ? 'stream of ' : ''}${shortName(method.inputType)}`,
        `${method.serverStreaming ? 'stream of ' : ''}${shortName(method.outputType)}`,
        commentAt(file, [...path, memberOf, at]),
      ]);
      return section(service.name, commentAt(file, path), ['method', 'takes', 'gives', 'meaning'], rows);
    }),
    ...file.messageType.map((message, index) => {
      const path = [inFile.messages, index];
      const rows = message.field.map((field, at) => [
        code(field.name),
        typeOf(field),
        commentAt(file, [...path, memberOf, at]),
      ]);
      return section(message.name, commentAt(file, path), ['field', 'type', 'meaning'], rows);
    }),
    ...file.enumType.map((choice, index) => {
      const path = [inFile.enums, index];
      const rows = choice.value.map((value, at) => [
        code(value.name),
        String(value.number),
        commentAt(file, [...path, memberOf, at]),
      ]);
      return section(choice.name, commentAt(file, path), ['value', 'number', 'meaning'], rows);
    }),
  ]);
  return pageOf({ title: 'API: mimo.inference.v1', source: 'the protos', parts });
}

function describeProtos(root: string): readonly FileDescriptorProto[] {
  const directory = mkdtempSync(join(tmpdir(), 'mimo-api-'));
  try {
    const output = join(directory, 'protos.binpb');
    const buf = join(root, 'node_modules/.bin/buf');
    execFileSync(buf, ['build', '--path', 'proto/mimo', '-o', output], { cwd: root, stdio: 'pipe' });
    return fromBinary(FileDescriptorSetSchema, readFileSync(output)).file;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

function section(
  name: string,
  comment: string,
  heads: readonly string[],
  rows: readonly (readonly string[])[],
): string {
  const table = rows.length === 0 ? '' : `\n\n${tableOf(heads, rows)}`;
  return `## ${name}\n\n${comment}${table}`.replaceAll(/\n{3,}/g, '\n\n');
}

function commentAt(file: FileDescriptorProto, path: readonly number[]): string {
  const location = file.sourceCodeInfo?.location.find((each) => each.path.join() === path.join());
  return (location?.leadingComments ?? '').trim().replaceAll(/\n ?/g, ' ');
}

function typeOf(field: FieldDescriptorProto): string {
  const name = field.typeName === '' ? (Type[field.type] ?? '').toLowerCase() : shortName(field.typeName);
  if (field.label === Label.REPEATED) {
    return `repeated ${name}`;
  }
  return field.proto3Optional ? `optional ${name}` : name;
}

function shortName(typeName: string): string {
  return typeName.slice(typeName.lastIndexOf('.') + 1);
}
