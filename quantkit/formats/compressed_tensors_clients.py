"""compressed-tensors, the clients: which of them load an artifact, which do not, and why.

Each client below is one released version.  What is said of transformers was measured with ``benchmarks/client_matrix.py``; what is
said of vLLM, SGLang and TGI was read in their sources.  ``loads`` is False as well where a client loads the files but computes
something else than the stored weights say: a wrong answer is worse than an error.  Newer releases may lift a limit; the notes never
stop a conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.formats.base import ClientNote
from quantkit.formats.compressed_tensors_config import Schemes, check, encoding, format_name
from quantkit.llama4 import Llama4Config, Role
from quantkit.scheme import BLOCK_SIZE, Scheme

VLLM = "vLLM 0.33"
SGLANG = "SGLang 0.5.23"
TGI = "TGI 3.3"
TRANSFORMERS_5_23 = "transformers 5.23 with compressed-tensors 0.20"
TRANSFORMERS_5_17 = "transformers 5.17 with compressed-tensors 0.19"
TRANSFORMERS_4_57 = "transformers 4.57 with compressed-tensors 0.12"

TRITON_GROUPS = (32, 128)  # group sizes of SGLang's Triton kernel for INT4 experts


@dataclass(frozen=True)
class _Contents:
    """What the rules ask about an artifact."""

    schemes: frozenset[Scheme]
    by_role: dict[Role, frozenset[Scheme]]
    query_key: frozenset[Scheme]  # schemes of q_proj and k_proj, whose rows vLLM and SGLang reorder at load, scales with them
    mixed: bool  # the groups need different encodings
    ranks: int | None  # tensor-parallel ranks among which whole groups or blocks of an expert can be shared out
    kv_cache: bool  # scales of keys and values are stored
    single_block: bool  # a matrix of a block scheme is only one block high or wide

    @property
    def experts(self) -> frozenset[Scheme]:
        return self.by_role.get("routed_expert", frozenset())

    @property
    def asymmetric(self) -> bool:
        return any(not scheme.symmetric for scheme in self.schemes)

    @property
    def mxfp4(self) -> bool:
        return any(format_name(scheme) == "mxfp4-pack-quantized" for scheme in self.schemes)


def client_notes(schemes: Schemes, config: Llama4Config, kv_cache: str | None = None) -> list[ClientNote]:
    """What each client makes of an artifact of these schemes; None as scheme means kept as in the source.

    Raises RecipeError, with all problems in one message, for what no client could load from this format.
    """
    check(schemes)
    contents = _contents(schemes, config, kv_cache)
    notes = []
    for client, rules in _RULES.items():
        refused, remarks = rules(contents)
        notes.append(ClientNote(client, not refused, "; ".join(refused or remarks)))
    return notes


def _contents(schemes: Schemes, config: Llama4Config, kv_cache: str | None) -> _Contents:
    by_role: dict[Role, set[Scheme]] = {}
    query_key = set()
    single_block = False
    for matrix, scheme in schemes.items():
        if scheme is not None:
            by_role.setdefault(matrix.role, set()).add(scheme)
            if matrix.projection in ("q_proj", "k_proj") and scheme.granularity != "tensor":
                query_key.add(scheme)
            single_block |= scheme.granularity == "block" and BLOCK_SIZE in matrix.shape
    used = frozenset(scheme for found in by_role.values() for scheme in found)
    cut = [scheme for scheme in by_role.get("routed_expert", ()) if scheme.granularity in ("group", "block")]
    spans = [scheme.group_size or BLOCK_SIZE for scheme in cut]
    return _Contents(
        schemes=used,
        by_role={role: frozenset(found) for role, found in by_role.items()},
        query_key=frozenset(query_key),
        mixed=len({format_name(scheme) for scheme in used}) > 1,
        ranks=config.expert_width // max(spans) if spans else None,
        kv_cache=kv_cache is not None,
        single_block=single_block,
    )


Verdict = tuple[list[str], list[str]]  # why the client cannot use the artifact; otherwise what to mind


def _vllm(contents: _Contents) -> Verdict:
    refused, remarks = [], []
    if any(scheme.granularity == "block" for scheme in contents.query_key):
        refused.append("it reorders the rows of q_proj and k_proj for its rotary embedding, which 128 x 128 blocks do not allow")
    if any(not scheme.symmetric for scheme in contents.query_key):
        refused.append("it reorders the rows of q_proj and k_proj but not their zero points, so answers are wrong")
    if contents.query_key:
        remarks.append("quantized q_proj and k_proj need a release that reorders their scales too; older ones answer wrongly")
    if contents.asymmetric:
        remarks.append("experts with zero points need a recent release")
    if contents.mxfp4:
        remarks.append("on GPUs with FP4 units it rounds activations to MXFP4 as well")
    if any(scheme.static_activations for scheme in contents.experts):
        remarks.append("experts of a layer all quantize activations with the largest of their scales")
    if contents.kv_cache:
        remarks.append(
            "it keeps keys and values in FP8 whatever --kv-cache-dtype says; releases before 2026 need --kv-cache-dtype fp8"
        )
    if contents.ranks is not None and contents.ranks < 8:
        remarks.append(f"tensor parallelism over at most {contents.ranks} GPUs, so that scales are not cut apart")
    return refused, remarks


def _sglang(contents: _Contents) -> Verdict:
    refused, remarks = [], []
    packed = {scheme for scheme in contents.experts if encoding(scheme) == "packed"}
    if contents.query_key:
        refused.append("it reorders the rows of q_proj and k_proj but not their scales, so answers are wrong")
    if contents.mxfp4:
        refused.append("it has no MXFP4 scheme for linear layers and its Llama 4 loader does not know the tensors")
    if any(scheme.number == "int8" and scheme.dynamic_activations for scheme in contents.experts):
        refused.append("INT8 activations are implemented for experts on NPUs only")
    if contents.mixed and packed:
        refused.append("packed integer experts need 'pack-quantized' as the top-level format, and this recipe mixes encodings")
    if any(not scheme.symmetric for scheme in contents.experts):
        refused.append("it takes the experts' zero points for AWQ's bit order")
    triton = all(scheme.number == "int4" and scheme.group_size in TRITON_GROUPS for scheme in packed)
    if not triton or any(scheme.global_scale for scheme in contents.experts):
        refused.append(
            "its Marlin kernels, the only ones for these experts, multiply the router score onto the output of an expert; Llama 4 "
            "needs it on the input, so answers are wrong"
        )
    elif packed:
        remarks.append(
            "start it with --moe-runner-backend triton (its own choice on Blackwell): its Marlin kernels multiply the router score "
            "onto the output of an expert, and Llama 4 needs it on the input"
        )
    if any(scheme.static_activations for scheme in contents.experts):
        remarks.append("experts of a layer all quantize activations with the largest of their scales")
    if contents.kv_cache:
        remarks.append("it does not use the stored scales of keys and values for Llama 4: leave --kv-cache-dtype at auto")
    return refused, remarks


def _tgi(contents: _Contents) -> Verdict:
    return ["its last releases run Llama 4 through transformers 4.51, which cannot load quantized experts of this format"], []


_FORWARD_WITHOUT_CACHE = (
    "with quantized keys and values it generates, but a forward pass without a cache fails; and it says that such scales are "
    "missing in the vision tower, which has no use for them"
)


def _transformers_5_23(contents: _Contents) -> Verdict:
    remarks = [_FORWARD_WITHOUT_CACHE] if contents.kv_cache else []
    return (["it expects zero points unpacked, a size mismatch"] if contents.asymmetric else []), remarks


def _transformers_5_17(contents: _Contents) -> Verdict:
    return [], [_FORWARD_WITHOUT_CACHE] if contents.kv_cache else []


def _transformers_4_57(contents: _Contents) -> Verdict:
    refused, remarks = [], []
    if contents.asymmetric:
        refused.append("it cannot unpack zero points")
    if contents.mxfp4:
        refused.append("it does not know the format mxfp4-pack-quantized")
    if contents.mixed:
        refused.append("it does not know the format mixed-precision")
    if contents.single_block:
        refused.append(f"it misreads the scales of a weight that is only one block of {BLOCK_SIZE} high or wide")
    if contents.kv_cache:
        remarks.append("it leaves keys and values as they are")
    if any(scheme.global_scale for scheme in contents.schemes):
        remarks.append("it rounds weight_global_scale to bfloat16, so weights are off by up to 0.2 %")
    return refused, remarks


_RULES = {
    VLLM: _vllm,
    SGLANG: _sglang,
    TGI: _tgi,
    TRANSFORMERS_5_23: _transformers_5_23,
    TRANSFORMERS_5_17: _transformers_5_17,
    TRANSFORMERS_4_57: _transformers_4_57,
}
