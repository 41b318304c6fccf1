"""How much memory a model will take, foretold from its header; pure.

The formulas follow llama.cpp's own sizes: K and V rows as in `llama_kv_cache`, windowed layers as in
`llama_kv_cache_iswa`, recurrent states as in `llama_hparams::n_embd_r` and `n_embd_s`, contexts rounded to 256 cells a
slot as in `llama_context`. The compute buffer is fitted to what build 11669 logs ("compute buffer size", flash
attention on, as by default). Not counted: `--cache-ram`, context checkpoints, a GPU driver's own few hundred MB, and
builds that keep logits for a whole batch (2 kB more per vocabulary entry).
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.models.gguf import GGUFHeader

_UBATCH = 512  # llama-server's default --ubatch-size
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


@dataclass(frozen=True)
class Footprint:
    """Bytes on one kind of memory."""

    weights_bytes: int
    kv_bytes: int  # recurrent states too
    compute_bytes: int

    @property
    def total(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def predict(
    header: GGUFHeader,
    ctx_total: int,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    n_parallel: int = 1,
    ngl: int | None = None,
) -> Footprint:
    """What `-c ctx_total -np n_parallel --no-kv-unified` will take: in RAM, or with `ngl` layers on GPUs, there.

    `ctx_total` 0 means the trained context, as in llama-server. Within 15 % of llama-server's own buffers for models
    of 300 MB and more; see tests/test_ledger.py and tests/real/test_footprint.py.
    """
    cells = _pad(_pad(ctx_total or header.n_ctx_train) // n_parallel)
    k, v = _CACHE_BYTES.get(cache_type_k, 2.0), _CACHE_BYTES.get(cache_type_v, 2.0)
    window_cells = _pad(min(cells, header.sliding_window + _UBATCH))
    windowed = False
    kv = 0.0
    for layer in range(header.n_layers):
        if _is_recurrent(header, layer):
            kv += 4 * _state_values(header)
        elif header.architecture not in _WITHOUT_CACHE and layer < header.n_layers - header.shared_kv_layers:
            heads, window = header.n_head_kv[layer], _is_windowed(header, layer)
            windowed |= window
            if window:
                kv += heads * window_cells * (header.key_length_swa * k + header.value_length_swa * v)
            else:
                kv += heads * cells * (header.key_length * k + header.value_length * v)
    kv *= n_parallel
    batch = min(_UBATCH, cells * n_parallel)
    # Three rows of a feed-forward and five of an embedding live at once, and the attention masks in f16.
    compute = batch * (4 * (3 * header.n_ff + 5 * header.n_embd) + 2 * (cells + windowed * window_cells))
    if ngl is None:
        copied = header.embedding_bytes if header.tied and header.embedding_type in _REPACKED else 0
        outputs = 4 * header.n_vocab * n_parallel
        return Footprint(header.tensor_bytes + copied, round(kv), compute + outputs)
    share = min(ngl, header.n_layers + 1) / (header.n_layers + 1)
    # The embedding stays in RAM; where the output is tied to it, the GPU gets a copy.
    weights = header.tensor_bytes - (0 if header.tied else header.embedding_bytes)
    return Footprint(round(weights * share), round(kv * share), compute if share else 0)


def fit_parallel(
    header: GGUFHeader,
    ctx_per_request: int,
    available_bytes: int,
    margin_bytes: int,
    wanted: int = 4,
    ngl: int | None = None,
) -> int:
    """As many slots of `ctx_per_request` as fit beside the margin, `wanted` at most; 1 if not even that fits."""
    for slots in range(wanted, 1, -1):
        if predict(header, ctx_per_request * slots, n_parallel=slots, ngl=ngl).total + margin_bytes <= available_bytes:
            return slots
    return 1


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
