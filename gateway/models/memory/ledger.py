"""How much memory a model will take, foretold from its header and its llama-server's arguments; pure.

The formulas follow llama.cpp's own sizes: K and V rows as in `llama_kv_cache`, windowed layers as in
`llama_kv_cache_iswa`, recurrent states as in `llama_hparams::n_embd_r` and `n_embd_s`, contexts rounded to 256 cells a
slot as in `llama_context`, layers on devices as in `llama_model::load_tensors`. The compute buffer is fitted to what
build 11669 logs ("compute buffer size", flash attention on, as by default). Not counted: context checkpoints, and
builds that keep logits for a whole batch (2 kB more per vocabulary entry).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.models.gguf.header import GGUFHeader
from gateway.models.memory.arguments import Facts
from gateway.models.memory.device import RAM, Device
from gateway.models.memory.placement import Placement, place
from gateway.models.policy import Budget

_MIB = 1 << 20
# Bytes of one cached value; a type not listed is newer, and smaller than f16.
_CACHE_BYTES = {
    "f32": 4.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
# Q4_0, Q4_K and IQ4_NL are rearranged for the CPU, and an embedding is needed as it was besides.
_REPACKED = frozenset((2, 12, 20))
# Periods of architectures whose files do not name them: each so-many-th layer sees everything, the others a window.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4}
_WITHOUT_CACHE = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding".split()
)
_MOST_CACHE_RAM_MB = 1024  # llama-server's own default is 8 GiB
# What build 11669 holds in RAM besides its buffers: 17 MiB of its own code and 4 of data, and the vocabulary.
_PROCESS_BYTES, _TOKEN_BYTES = 24 * _MIB, 160


@dataclass(frozen=True)
class Footprint:
    """Bytes on one kind of memory."""

    weights_bytes: int
    kv_bytes: int  # recurrent states too
    compute_bytes: int

    @property
    def total(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def need(
    header: GGUFHeader,
    facts: Facts,
    devices: Sequence[Device],
    file_bytes: int = 0,
    measured: Mapping[str, int] | None = None,
    multiplier: float = 1.0,
) -> dict[str, int]:
    """Bytes by device that a llama-server started with `facts` has to be given.

    `devices` are those that it sees, in its order (`device.visible`); `file_bytes` is the size of `facts.files`.
    `measured` are the buffers that it told of another time; without any, what is foretold is taken `multiplier` times.
    """
    where = place(header.n_layers, facts, devices)
    found = dict(measured or _buffers(header, facts, where))
    if facts.mmproj or not measured:  # of a projector llama-server tells what it computes in, not its weights
        beside = where.gpus[0] if where.gpus and facts.mmproj_offload else RAM
        found[beside] = found.get(beside, 0) + file_bytes
    if not measured:
        found = {device: round(size * multiplier) for device, size in found.items()}
    sizes = {device.name: device.total for device in devices}
    for gpu in where.gpus:
        found[gpu] = found.get(gpu, 0) + context_bytes(sizes[gpu])
    process = _PROCESS_BYTES + _TOKEN_BYTES * header.n_vocab
    found[RAM] = found.get(RAM, 0) + facts.cache_ram_mb * _MIB + process
    return {device: size for device, size in found.items() if size}


def context_bytes(total: int) -> int:
    """What a process takes of a GPU of `total` bytes for itself, buffers aside.

    Measured by others: 107 MiB of 16 GB (RTX 4060 Ti), 555 of 96 (RTX PRO 6000); it grows with the number of cores.
    https://github.com/ggml-org/llama.cpp/pull/23604
    """
    return 100 * _MIB + 5 * _MIB * (total >> 30)


def cache_ram_mb(header: GGUFHeader, ctx: int, parallel: int) -> int:
    """For `--cache-ram`, MiB: prompts as many as the slots hold, but no more than 1024; 0 where nothing is cached."""
    kv = predict(header, Facts(ctx_total=ctx * parallel, parallel=parallel, kv_unified=False)).kv_bytes
    return min(_MOST_CACHE_RAM_MB, -(-kv // _MIB))


def usable_budget(
    devices: Sequence[Device], budget_mb: int, margin_mb: int, held: Mapping[str, int], max_models: int | None = None
) -> Budget:
    """What all our models together may have: on each device, and in all over the GPUs, or in RAM where there is none.

    `held` is how much of each device's `total - free` is ours: what is booked on a GPU, `anonymous_bytes` in RAM; the
    rest is others', and counts against the limit. `budget_mb` 0 means what the devices have. The margin stays free on
    each device.
    """
    limits = {one.name: max(0, min(one.total, one.free + held.get(one.name, 0)) - margin_mb * _MIB) for one in devices}
    counted = frozenset(limits) - {RAM} or frozenset((RAM,))
    in_all = sum(limits[name] for name in counted if name in limits)
    return Budget(limits, min(in_all, budget_mb * _MIB) if budget_mb else in_all, counted, max_models)


def predict(header: GGUFHeader, facts: Facts) -> Footprint:
    """The buffers of a start without GPUs.

    Within 15 % of llama-server's own for models of 300 MB and more; see tests/test_ledger.py and tests/real.
    """
    return Footprint(
        header.tensor_bytes + _copied(header, facts),
        round(sum(_kv_by_layer(header, facts))),
        _compute_bytes(header, facts) + _output_bytes(header, facts),
    )


def _buffers(header: GGUFHeader, facts: Facts, where: Placement) -> dict[str, int]:
    """Weights, KV and compute by device."""
    found: dict[str, float] = dict.fromkeys((RAM, *where.gpus), 0.0)
    experts = header.expert_bytes / header.n_layers
    layer_bytes = max(0, header.tensor_bytes - header.embedding_bytes - header.output_bytes) / header.n_layers
    for layer, kv in enumerate(_kv_by_layer(header, facts)):
        in_ram = experts if layer < facts.cpu_moe and where.layers[layer] != {RAM: 1.0} else 0.0
        found[RAM] += in_ram
        for device, share in where.layers[layer].items():
            found[device] += share * (layer_bytes - in_ram)
        for device, share in where.caches[layer].items():
            found[device] += share * kv
    found[RAM] += header.embedding_bytes
    output = header.embedding_bytes if header.tied else header.output_bytes
    if where.output == RAM:
        found[RAM] += _copied(header, facts) if header.tied else output
    else:
        found[where.output] += output
    compute = _compute_bytes(header, facts)
    for device in where.computing:
        found[device] += compute
    if where.computing != (RAM,):
        found[RAM] += _host_bytes(header, facts)
    found[RAM] += _output_bytes(header, facts)
    return {device: round(size) for device, size in found.items()}


def _cells(header: GGUFHeader, facts: Facts) -> tuple[int, int, int]:
    """Cells of a whole and of a windowed cache, and how many of them there are."""
    ctx = _pad(facts.ctx_total or header.n_ctx_train)
    streams = 1 if facts.kv_unified else facts.parallel
    cells = _pad(ctx // streams)
    wanted = header.sliding_window * (facts.parallel if facts.kv_unified else 1) + _ubatch(facts)
    return cells, cells if facts.swa_full else _pad(min(cells, wanted)), streams


def _ubatch(facts: Facts) -> int:
    return min(facts.ubatch or facts.batch, facts.batch)


def _kv_by_layer(header: GGUFHeader, facts: Facts) -> list[float]:
    k, v = _CACHE_BYTES.get(facts.cache_type_k, 2.0), _CACHE_BYTES.get(facts.cache_type_v, 2.0)
    cells, window_cells, streams = _cells(header, facts)
    found = []
    for layer in range(header.n_layers):
        if _is_recurrent(header, layer):
            found.append(4.0 * _state_values(header) * facts.parallel)
        elif header.architecture in _WITHOUT_CACHE or layer >= header.n_layers - header.shared_kv_layers:
            found.append(0.0)
        elif _is_windowed(header, layer):
            row = header.key_length_swa * k + header.value_length_swa * v
            found.append(header.n_head_kv[layer] * window_cells * row * streams)
        else:
            row = header.key_length * k + header.value_length * v
            found.append(header.n_head_kv[layer] * cells * row * streams)
    return found


def _compute_bytes(header: GGUFHeader, facts: Facts) -> int:
    cells, window_cells, streams = _cells(header, facts)
    masks = cells + window_cells * any(_is_windowed(header, layer) for layer in range(header.n_layers))
    batch = min(_ubatch(facts), cells * streams)
    # Three rows of a feed-forward and five of an embedding live at once, and the attention masks in f16.
    compute = batch * (4 * (3 * header.n_ff + 5 * header.n_embd) + 2 * masks)
    if facts.flash:
        return compute
    # Without flash attention all scores of a layer live at once, and the masks in f32.
    rows = 3 * header.n_embd + 3 * header.n_head * header.key_length + 2 * max(header.n_head_kv) * header.key_length
    return max(compute, batch * 4 * (rows + header.n_head * cells + masks))


def _host_bytes(header: GGUFHeader, facts: Facts) -> int:
    """What the CPU keeps to feed GPUs: embedded tokens and the masks."""
    cells, window_cells, streams = _cells(header, facts)
    batch = min(_ubatch(facts), cells * streams)
    return batch * (8 * header.n_embd + 2 * (cells + window_cells))


def _output_bytes(header: GGUFHeader, facts: Facts) -> int:
    return 4 * header.n_vocab * facts.parallel


def _copied(header: GGUFHeader, facts: Facts) -> int:
    return header.embedding_bytes if header.tied and facts.repack and header.embedding_type in _REPACKED else 0


def _pad(cells: int) -> int:
    return -(-cells // 256) * 256


def _is_recurrent(header: GGUFHeader, layer: int) -> bool:
    if header.full_attention_interval:
        return (layer + 1) % header.full_attention_interval != 0
    return any(header.ssm) and not header.n_head_kv[layer]


def _state_values(header: GGUFHeader) -> int:
    conv_kernel, inner, state, groups = header.ssm
    return max(0, conv_kernel - 1) * (inner + 2 * groups * state) + state * inner


def _is_windowed(header: GGUFHeader, layer: int) -> bool:
    pattern = header.sliding_pattern or _WINDOW_PERIODS.get(header.architecture, 0)
    if not header.sliding_window or not pattern:
        return False
    return bool(pattern[layer]) if isinstance(pattern, tuple) else layer % pattern < pattern - 1
