"""What an engine is made of, as its builder tells it: no driver is needed, unlike for TensorRT's inspector."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from flamingo_export.backends.tensorrt.lowering.lint import Expected
from flamingo_export.backends.tensorrt.lowering.shapes import Profile
from flamingo_export.bundle.manifest import EngineSummary, ProfileSummary

_KERNEL = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[\w ]+), (?P<rest>.*)$", re.MULTILINE)
_OUTPUTS = re.compile(r"Outputs: \[(.*?)\], TacticName:")
_DATATYPE = re.compile(r"Datatype: (\w+)")
_MEMORY = re.compile(r"Total Activation Memory: (\d+) bytes")
# A kernel that reads nothing but quantised constants and writes floats: it widens weights, and the product is another kernel's.
_WIDENS = re.compile(
    r"Inputs: \[\], Constants: \[.*?Datatype: (?:Int4|Int8|FP8)\b.*?\], Outputs: \[.*?Datatype: (?:Half|BFloat16|Float)\b"
)
# What TensorRT calls a kernel that computes a whole attention: _gemm_mha_v2, fmha_v2 and the like.
_ATTENTION = re.compile(r"mha", re.IGNORECASE)


def summarise(
    facts: Iterable[str], expected: Expected, layers: Counter[str], profiles: tuple[Profile, ...], lengths: int = 0
) -> EngineSummary:
    """facts: messages of the build. layers: of the network by type. lengths: attentions that know the slots in use. The memory of profile i
    is the i-th that the builder names."""
    text = "\n".join(facts)
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    attention = widening = 0
    for kernel in _KERNEL.finditer(text):
        kinds[kernel["kind"]] += 1
        attention += bool(_ATTENTION.search(kernel["name"]))
        widening += bool(_WIDENS.search(kernel["rest"]))
        outputs = _OUTPUTS.search(kernel["rest"])
        types.update(set(_DATATYPE.findall(outputs[1])) if outputs else ())
    memory = [int(found) for found in _MEMORY.findall(text)]
    return EngineSummary(
        layers=sum(layers.values()),
        kernels=dict(kinds.most_common()),
        attentions=expected.attentions,
        fused_attentions=attention // len(profiles),
        attentions_with_lengths=lengths,
        quantised_products=expected.quantised,
        widened_products=min(expected.quantised, -(-widening // len(profiles))),
        plugin_layers=expected.plugin_layers,
        cache_updates=expected.cache_updates,
        output_types=dict(types.most_common()),
        weight_bytes=sum(tensor.nbytes for tensor in expected.weights.values()),
        profiles=tuple(
            ProfileSummary(
                name=profile.name,
                bounds={symbol: (bounds.least, bounds.usual, bounds.most) for symbol, bounds in profile.bounds.items()},
                activation_bytes=memory[index] if len(memory) == len(profiles) else None,
            )
            for index, profile in enumerate(profiles)
        ),
    )
