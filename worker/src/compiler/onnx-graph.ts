// Writes ONNX models as bytes. Owns the protobuf field numbers of ONNX that segments need. Knows neither the meaning of
// operators nor files: weights are references into an external data file.
// Source: onnx.proto (IR version 10), fields as numbered there.
//
// Why no library: onnx-proto brings protobufjs, a second protobuf library, and an object for every field of a model;
// code generated from onnx.proto would be thousands of lines for the few fields that segments have; Python's onnx
// package would need Python where models are compiled.

import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire';

/** Element types by their TensorProto.DataType number. */
export const elementTypes = { float: 1, uint8: 2, int32: 6, int64: 7, float16: 10, bfloat16: 16 } as const;

export type ElementType = keyof typeof elementTypes;

/** An input or output; a string dimension is a named dynamic one. */
export interface GraphValue {
  readonly name: string;
  readonly type: ElementType;
  readonly dims: readonly (number | string)[];
}

/** A constant tensor of `bytes` bytes at `offset` of `file`, which is in the model's folder. */
export interface GraphWeight {
  readonly name: string;
  readonly type: ElementType;
  readonly dims: readonly number[];
  readonly file: string;
  readonly offset: number;
  readonly bytes: number;
}

/** One operator; an empty input or output name omits that optional operand. */
export interface GraphNode {
  readonly op: string;
  /** Absent: ai.onnx. */
  readonly domain?: 'com.microsoft';
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly ints?: Readonly<Record<string, number>>;
  readonly floats?: Readonly<Record<string, number>>;
  readonly intLists?: Readonly<Record<string, readonly number[]>>;
}

/** A whole graph, nodes in an order where every value is written before it is read. */
export interface Graph {
  readonly name: string;
  readonly inputs: readonly GraphValue[];
  readonly outputs: readonly GraphValue[];
  readonly weights: readonly GraphWeight[];
  readonly nodes: readonly GraphNode[];
}

const irVersion = 10;
const opsets = { '': 21, 'com.microsoft': 1 } as const;
const attributeTypes = { float: 1, int: 2, ints: 7 } as const;
const externalDataLocation = 1;

/** The bytes of an ONNX ModelProto with this one graph; the same graph always gives the same bytes. */
export function encodeModel(graph: Graph): Uint8Array<ArrayBuffer> {
  const writer = new BinaryWriter();
  writer.tag(1, WireType.Varint).int64(irVersion);
  text(writer, 2, 'mimo');
  message(writer, 7, () => writeGraph(writer, graph));
  for (const [domain, version] of Object.entries(opsets)) {
    message(writer, 8, () => {
      text(writer, 1, domain);
      writer.tag(2, WireType.Varint).int64(version);
    });
  }
  return writer.finish();
}

function writeGraph(writer: BinaryWriter, graph: Graph): void {
  graph.nodes.forEach((node, index) => message(writer, 1, () => writeNode(writer, node, index)));
  text(writer, 2, graph.name);
  for (const weight of graph.weights) {
    message(writer, 5, () => writeWeight(writer, weight));
  }
  for (const value of graph.inputs) {
    message(writer, 11, () => writeValue(writer, value));
  }
  for (const value of graph.outputs) {
    message(writer, 12, () => writeValue(writer, value));
  }
}

function writeNode(writer: BinaryWriter, node: GraphNode, index: number): void {
  for (const name of node.inputs) {
    text(writer, 1, name);
  }
  for (const name of node.outputs) {
    text(writer, 2, name);
  }
  text(writer, 3, `${node.op}.${index}`);
  text(writer, 4, node.op);
  for (const [name, value] of Object.entries(node.floats ?? {})) {
    message(writer, 5, () => {
      text(writer, 1, name);
      writer.tag(2, WireType.Bit32).float(value);
      writer.tag(20, WireType.Varint).int32(attributeTypes.float);
    });
  }
  for (const [name, value] of Object.entries(node.ints ?? {})) {
    message(writer, 5, () => {
      text(writer, 1, name);
      writer.tag(3, WireType.Varint).int64(value);
      writer.tag(20, WireType.Varint).int32(attributeTypes.int);
    });
  }
  for (const [name, values] of Object.entries(node.intLists ?? {})) {
    message(writer, 5, () => {
      text(writer, 1, name);
      values.forEach((value) => writer.tag(8, WireType.Varint).int64(value));
      writer.tag(20, WireType.Varint).int32(attributeTypes.ints);
    });
  }
  text(writer, 7, node.domain ?? '');
}

function writeWeight(writer: BinaryWriter, weight: GraphWeight): void {
  for (const dim of weight.dims) {
    writer.tag(1, WireType.Varint).int64(dim);
  }
  writer.tag(2, WireType.Varint).int32(elementTypes[weight.type]);
  text(writer, 8, weight.name);
  const location = { location: weight.file, offset: String(weight.offset), length: String(weight.bytes) };
  for (const [key, value] of Object.entries(location)) {
    message(writer, 13, () => {
      text(writer, 1, key);
      text(writer, 2, value);
    });
  }
  writer.tag(14, WireType.Varint).int32(externalDataLocation);
}

function writeValue(writer: BinaryWriter, value: GraphValue): void {
  text(writer, 1, value.name);
  message(writer, 2, () => {
    message(writer, 1, () => {
      writer.tag(1, WireType.Varint).int32(elementTypes[value.type]);
      message(writer, 2, () => {
        for (const dim of value.dims) {
          message(writer, 1, () => {
            if (typeof dim === 'number') {
              writer.tag(1, WireType.Varint).int64(dim);
            } else {
              text(writer, 2, dim);
            }
          });
        }
      });
    });
  });
}

function text(writer: BinaryWriter, field: number, value: string): void {
  writer.tag(field, WireType.LengthDelimited).string(value);
}

function message(writer: BinaryWriter, field: number, fill: () => void): void {
  writer.tag(field, WireType.LengthDelimited).fork();
  fill();
  writer.join();
}
