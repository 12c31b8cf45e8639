"""ONNX for older readers: opset 17 and IR 8, named axes, or a fixed batch.

PyTorch writes opset 18 and IR 10, and neither its own converter nor onnx's lowers this model. Three of the operators
that the model consists of changed in opset 18: Split, ReduceMean and Pad.
"""

import re

import onnx
from onnx import ModelProto, NodeProto, numpy_helper, shape_inference

OPSET, IR = 17, 8
AXES = ("batch", "channels", "height", "width")  # of the images


def lower(model: ModelProto) -> None:
    """Opset 18 to 17, in place; ValueError when an operator means another thing there."""
    initial = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Split":  # equal parts, as without the attribute
            _drop(node, "num_outputs")
        elif node.op_type == "ReduceMean" and len(node.input) == 2:
            axes = numpy_helper.to_array(initial[node.input.pop()]).tolist()
            _drop(node, "noop_with_empty_axes")
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        elif not (node.op_type == "Pad" and len(node.input) <= 3) and _changed(node.op_type):
            raise ValueError(f"{node.op_type} of opset 18 has no form in opset {OPSET}")
    used = {name for node in model.graph.node for name in node.input}
    for name in initial.keys() - used:
        model.graph.initializer.remove(initial[name])
    for entry in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output,
                  *model.graph.value_info, model.graph):  # fmt: skip
        del entry.metadata_props[:]  # since IR 10; it also holds paths of the machine
    model.ir_version = IR
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))


def name_axes(model: ModelProto) -> None:
    """Calls the dynamic axes of the images `batch`, `height` and `width`, wherever they occur."""
    sides = model.graph.input[0].type.tensor_type.shape.dim
    names = {side.dim_param: name for side, name in zip(sides, AXES, strict=True) if side.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), side.dim_param)


def fixed(model: ModelProto, batch: int) -> ModelProto:
    """A copy for one batch size, with all shapes inferred again."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for value in (copy.graph.input[0], copy.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch  # also clears its name
    del copy.graph.value_info[:]
    return shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True)


def _drop(node: NodeProto, name: str) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)


def _changed(operator: str) -> bool:
    return onnx.defs.get_schema(operator, 18).since_version != onnx.defs.get_schema(operator, OPSET).since_version
