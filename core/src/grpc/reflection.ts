// Server reflection (v1 and, for older tools, v1alpha), answered from the descriptor set that `buf build` wrote, so
// that grpcurl and buf curl work against any of our servers. Serves only the contents of the descriptor set:
// questions for extensions, which our protos do not use, get UNIMPLEMENTED.

import {
  createFileRegistry,
  fromBinary,
  toBinary,
  type DescFile,
  type FileRegistry,
} from '@bufbuild/protobuf';
import { FileDescriptorProtoSchema, FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt';
import * as grpc from '@grpc/grpc-js';

import type { ServerReflectionResponse, ServerReflectionServer } from '@mimo/proto/reflection';

/**
 * Makes the handlers of the reflection service; the same ones serve v1 and v1alpha. `services` are the full names of
 * the server's services: the set may describe more. Throws on a malformed set.
 */
export function createReflection(
  descriptorSet: Uint8Array,
  services: readonly string[],
): ServerReflectionServer {
  const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, descriptorSet));
  const described: Described = { registry, services };
  return {
    serverReflectionInfo: (call) => {
      call.on('data', (request: Parameters<typeof call.write>[0]['originalRequest']) => {
        const hasRoom = call.write({
          validHost: request?.host ?? '',
          originalRequest: request,
          messageResponse: answer(described, request?.messageRequest),
        });
        if (!hasRoom) {
          // An answer is larger than its question: clients that do not read answers get no more.
          call.pause();
          call.once('drain', () => call.resume());
        }
      });
      call.on('end', () => call.end());
    },
  };
}

interface Described {
  readonly registry: FileRegistry;
  readonly services: readonly string[];
}

type Question = NonNullable<ServerReflectionResponse['originalRequest']>['messageRequest'];
type Answer = ServerReflectionResponse['messageResponse'];

function answer({ registry, services }: Described, question: Question): Answer {
  switch (question?.$case) {
    case 'listServices':
      return { $case: 'listServicesResponse', value: { service: services.map((name) => ({ name })) } };
    case 'fileByFilename':
      return fileAnswer(question.value, registry.getFile(question.value));
    case 'fileContainingSymbol': {
      // A method or a field is found in the file of its type.
      const holder = question.value.slice(0, question.value.lastIndexOf('.'));
      return fileAnswer(question.value, (registry.get(question.value) ?? registry.get(holder))?.file);
    }
    case 'fileContainingExtension':
    case 'allExtensionNumbersOfType':
    case undefined:
    default:
      return refused(grpc.status.UNIMPLEMENTED, 'this reflection request is not supported');
  }
}

/** The file and everything it imports, dependencies included. */
function fileAnswer(asked: string, file: DescFile | undefined): Answer {
  if (file === undefined) {
    return refused(grpc.status.NOT_FOUND, `unknown name ${asked}`);
  }
  const files = new Set<DescFile>();
  const visit = (next: DescFile): void => {
    if (!files.has(next)) {
      files.add(next);
      for (const dependency of next.dependencies) {
        visit(dependency);
      }
    }
  };
  visit(file);
  const fileDescriptorProto = [...files].map(({ proto }) =>
    Buffer.from(toBinary(FileDescriptorProtoSchema, proto)),
  );
  return { $case: 'fileDescriptorResponse', value: { fileDescriptorProto } };
}

function refused(errorCode: number, errorMessage: string): Answer {
  return { $case: 'errorResponse', value: { errorCode, errorMessage } };
}
