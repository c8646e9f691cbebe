"""One pass of the model on the device: from token ids to logits, kernel by kernel.

Owns the buffers between the kernels and the choice of each kernel's configuration by the number of tokens. Everything is
allocated beforehand, so that a pass can be captured as a graph. Knows nothing of batches, requests or sampling.
"""

from collections.abc import Mapping

import torch

from jilju.backends.cuda.attention_configs import AttentionConfig, attention_config
from jilju.backends.cuda.kernels.attention import Partials, attention
from jilju.backends.cuda.kernels.embed import embed
from jilju.backends.cuda.kernels.glu import glu
from jilju.backends.cuda.kernels.kv import kv_layer
from jilju.backends.cuda.kernels.linear import Quantized, linear, linear_glu
from jilju.backends.cuda.kernels.norm import add_norm, rms_norm
from jilju.backends.cuda.kernels.rope import rope_and_write
from jilju.backends.cuda.lowering import Decoder, Layer, Matrix
from jilju.backends.cuda.step_inputs import StepInputs
from jilju.backends.cuda.tuning import LinearConfig, Mode, load_tuning, num_parts
from jilju.backends.cuda.weights import DeviceLayer, DeviceMatrix, DeviceWeights
from jilju.plan import Limits


class Forward:
    """`buffers` are those of memory.buffers()."""

    def __init__(
        self,
        decoder: Decoder,
        weights: DeviceWeights,
        buffers: Mapping[str, torch.Tensor],
        limits: Limits,
        mode: Mode,
        gpu_name: str,
        half: torch.dtype,
        pdl_tokens: int = 0,
    ):
        """In steps of up to `pdl_tokens` a kernel is launched, and asks for its first weights, before the one ahead of it ends."""
        self._decoder, self._weights, self._buffers = decoder, weights, buffers
        self._limits, self._mode, self._half = limits, mode, half
        self.pdl_tokens = pdl_tokens
        self._pdl = False
        self._tuning = load_tuning(gpu_name)
        self._configs: dict[tuple[Mode, int, int, bool, int], LinearConfig] = {}
        cache, scales = buffers["kv"], buffers.get("kv_scales")
        self._kv = [kv_layer(cache, scales, index) for index in range(len(decoder.layers))]
        self._angles = {
            angles: (buffers[f"cos {index}"], buffers[f"sin {index}"]) for index, angles in enumerate(decoder.angles)
        }

    def attention_config(self, num_rows: int, is_prefill: bool) -> AttentionConfig:
        op = self._decoder.layers[0].attention
        group = op.num_heads // op.num_kv_heads
        kv_dtype = "float8" if self._limits.kv_dtype == "fp8" else "half"
        return attention_config(self._mode, op.head_dim, group, num_rows, is_prefill, kv_dtype)

    def run(self, inputs: StepInputs) -> None:
        """Writes K and V of all tokens and leaves the residual stream behind, of which `logits` takes rows."""
        num_tokens = inputs.num_tokens
        decoder, weights = self._decoder, self._weights
        self._pdl = num_tokens <= self.pdl_tokens
        residual = self._buffers["residual"][:num_tokens]
        hidden = self._buffers["hidden"][:num_tokens]
        embed(weights.table, inputs.token_ids, decoder.embed.scale, residual, pdl=self._pdl)
        first = decoder.layers[0].input_norm
        rms_norm(residual, weights.layers[0].input_norm, first.eps, hidden, pdl=self._pdl)
        for index, (layer, weight) in enumerate(zip(decoder.layers, weights.layers, strict=True)):
            following = index + 1 < len(decoder.layers)
            next_norm = weights.layers[index + 1].input_norm if following else None
            self._attend(index, layer, weight, inputs, hidden)
            self._add(
                layer.output, weight.output, self._buffers["attended"][:num_tokens], residual, hidden,
                weight.post_attention_norm, weight.ffn_norm, layer.ffn_norm.eps,
            )  # fmt: skip
            gated = self._buffers["gated"][:num_tokens]
            self._gate(layer, weight, hidden, gated)
            self._add(
                layer.down, weight.down, gated, residual, hidden if following else None,
                weight.post_ffn_norm, next_norm, layer.ffn_norm.eps,
            )  # fmt: skip

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """rows int32 [L], tokens of the step that was run -> float32 [L, vocab], until the next call"""
        num_logits = len(rows)
        hidden = self._buffers["logit_hidden"][:num_logits]
        logits = self._buffers["logits"][:num_logits]
        norm, eps = self._weights.final_norm, self._decoder.final_norm.eps
        rms_norm(self._buffers["residual"], norm, eps, hidden, rows=rows, pdl=self._pdl)
        head = self._weights.head
        config = self._config(self._decoder.head, head, False, num_logits, self._mode)
        if config.kind == "matmul":  # logits are wanted in float32, which no library product of half matrices gives
            config = self._config(self._decoder.head, head, False, num_logits, "invariant")
        linear(hidden, head.weight, head.scale, logits.view(1, *logits.shape), config, pdl=self._pdl)
        return logits

    def _attend(self, index: int, layer: Layer, weight: DeviceLayer, inputs: StepInputs, hidden: torch.Tensor) -> None:
        num_tokens, op = inputs.num_tokens, layer.attention
        parts = self._linear(layer.qkv, weight.qkv, hidden)
        query = self._buffers["query"][:num_tokens].view(num_tokens, op.num_heads, op.head_dim)
        attended = self._buffers["attended"][:num_tokens].view(num_tokens, op.num_heads, op.head_dim)
        cos, sin = self._angles[layer.rope.angles]
        eps = layer.head_norms[0].eps if layer.head_norms else 0.0
        rope_and_write(
            parts, weight.qkv.bias, weight.q_norm, weight.k_norm, eps, layer.rope.style, cos, sin,
            inputs.positions, inputs.slots, query, self._kv[index], pdl=self._pdl,
        )  # fmt: skip
        partials = None
        if inputs.num_splits > 1:
            shape = (num_tokens, op.num_heads, inputs.num_splits)
            acc, stats = self._buffers["attention_acc"], self._buffers["attention_stats"]
            size = shape[0] * shape[1] * shape[2]
            acc, stats = acc[: size * op.head_dim].view(*shape, op.head_dim), stats[: size * 2].view(*shape, 2)
            partials = Partials(acc, stats, self._buffers["attention_counters"])
        attention(
            query, self._kv[index], inputs.tables, inputs.starts, inputs.first_tokens, inputs.counts,
            inputs.tile_rows, inputs.tile_tokens, attended, self.attention_config(len(inputs.starts), inputs.is_prefill),
            scale=op.scale, window=op.window, num_splits=inputs.num_splits, partials=partials,
            pdl=self._pdl,
        )  # fmt: skip

    def _add(
        self,
        matrix: Matrix,
        weight: DeviceMatrix,
        x: torch.Tensor,
        residual: torch.Tensor,
        hidden: torch.Tensor | None,
        post_norm: torch.Tensor | None,
        norm: torch.Tensor | None,
        eps: float,
    ) -> None:
        parts = self._linear(matrix, weight, x)
        add_norm(parts, residual, hidden, bias=weight.bias, post_weight=post_norm, weight=norm, eps=eps, pdl=self._pdl)

    def _gate(self, layer: Layer, weight: DeviceLayer, hidden: torch.Tensor, gated: torch.Tensor) -> None:
        matrix = weight.gate_up
        config = self._config(layer.gate_up, matrix, True, len(hidden), self._mode)
        if config.kind == "matmul":
            parts = self._parts(1, len(hidden), layer.gate_up.num_outputs, self._half)
            quantized = self._quantized(hidden, matrix)
            linear(hidden, matrix.weight, matrix.scale, parts, config, pdl=self._pdl, quantized=quantized)
            glu(parts, gated, layer.activation, pdl=self._pdl)
        else:
            linear_glu(hidden, matrix.weight, matrix.scale, gated, config, layer.activation, pdl=self._pdl)

    def _linear(self, matrix: Matrix, weight: DeviceMatrix, x: torch.Tensor) -> torch.Tensor:
        """x [T, K] half -> parts [S, T, N], to be summed by who takes them"""
        num_tokens = len(x)
        config = self._config(matrix, weight, False, num_tokens, self._mode)
        if config.kind == "matmul":
            parts = self._parts(1, num_tokens, matrix.num_outputs, self._half)
        else:
            num_splits = num_parts(config, num_tokens, matrix.num_outputs)
            if num_splits * num_tokens * matrix.num_outputs > len(self._buffers["parts"]):
                num_splits = 1  # the kernel sums itself: the same bits
            parts = self._parts(num_splits, num_tokens, matrix.num_outputs, torch.float32)
        quantized = self._quantized(x, weight) if config.kind == "matmul" else None
        linear(x, weight.weight, weight.scale, parts, config, pdl=self._pdl, quantized=quantized)
        return parts

    def _parts(self, num_splits: int, num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        flat = self._buffers["parts"].view(dtype)
        return flat[: num_splits * num_tokens * width].view(num_splits, num_tokens, width)

    def _quantized(self, x: torch.Tensor, weight: DeviceMatrix) -> Quantized | None:
        """Room for x in fp8 beside its product, in the other half of the parts: half products take no more than one."""
        if weight.scale is None:
            return None
        num_tokens, width = x.shape
        room = self._buffers["parts"].view(torch.uint8)[2 * len(self._buffers["parts"]) :]
        values = room[: num_tokens * width].view(torch.float8_e4m3fn)
        first = -(-num_tokens * width // 16) * 16
        return Quantized(values, room[first : first + 4 * num_tokens].view(torch.float32))

    def _config(self, matrix: Matrix, weight: DeviceMatrix, is_glu: bool, num_tokens: int, mode: Mode) -> LinearConfig:
        key = (mode, matrix.num_outputs, matrix.num_inputs, is_glu, num_tokens)
        config = self._configs.get(key)
        if config is None:
            dtype = "fp8" if weight.scale is not None else "bf16" if self._half == torch.bfloat16 else "f16"
            n, k = matrix.num_outputs, matrix.num_inputs
            config = self._tuning.linear(mode, dtype, n, k, num_tokens, is_glu)  # type: ignore[arg-type]
            self._configs[key] = config
        return config
