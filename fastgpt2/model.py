"""GPT-2 (Radford et al. 2019) as a PyTorch module: one forward, with or without a cache.

Pre-LayerNorm blocks, learned positions, tied head. Parameter names are Hugging Face's; weights of linear layers are
(out, in) as in `torch.nn.Linear`, where Hugging Face's Conv1D holds (in, out) (checkpoint.py transposes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config
from fastgpt2_kernels import ops

if TYPE_CHECKING:
    from fastgpt2.generate import Sample, TokenEvent
    from fastgpt2.tokenizer import Tokenizer

# What a block calls for attention: (packed projection, layer index, scale) -> attended values.
Attend = Callable[[Tensor, int, float], Tensor]


class Linear(nn.Module):
    """x weight^T + bias with an optional epilogue; on a CPU it can use a packed copy of its weight (`GPT2.pack`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._pack: ops.PackedLinear | None = None

    def pack(self) -> None:
        if self._pack is None or self._pack.fingerprint != ops.fingerprint(self.weight):
            self._pack = ops.pack_linear(self.weight)

    def unpack(self) -> None:
        self._pack = None

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight can be neither pickled nor deep-copied, and is made anew when it is wanted.
        return {**self.__dict__, "_pack": None}

    def forward(
        self, x: Tensor, *, activation: str = "linear", residual: Tensor | None = None, packed: bool = False,
        backend: str = "auto",
    ) -> Tensor:  # fmt: skip
        pack = self._pack if packed else None
        return ops.linear(
            x, self.weight, self.bias, activation=activation, residual=residual, packed=pack, backend=backend
        )


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, backend: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Of x; with a residual of the sum of both, and the sum."""
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps, backend=backend)
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=backend)


class XIELU(nn.Module):
    """xIELU (Huang and Schlag 2024): an activation with two learned slopes; parameters as transformers names them."""

    def __init__(self, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([math.log(math.expm1(alpha_p))]))
        self.alpha_n = nn.Parameter(torch.tensor([math.log(math.expm1(alpha_n - beta))]))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("eps", torch.tensor(eps))

    def forward(self, x: Tensor) -> Tensor:
        beta, eps = self.get_buffer("beta"), self.get_buffer("eps")
        slope_p, slope_n = F.softplus(self.alpha_p), beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.minimum(x, eps)) - x) * slope_n + beta * x
        return torch.where(x > 0, slope_p * x * x + beta * x, negative)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Linear(config.hidden_size, config.hidden_size)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.inner_dim)
        self.c_proj = Linear(config.inner_dim, config.hidden_size)
        learned = {"prelu": nn.PReLU, "xielu": XIELU}.get(config.activation_function)
        self.act = learned() if learned else None
        self.activation_name = "linear" if learned else config.activation_function

    def up(self, x: Tensor, packed: bool, backend: str) -> Tensor:
        has_kernel = self.activation_name in ops.TRITON_ACTIVATIONS and not packed
        backend = backend if has_kernel else "auto"
        x = self.c_fc(x, activation=self.activation_name, packed=packed, backend=backend)
        return x if self.act is None else self.act(x)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.layer = layer
        self.scale = config.attention_scale(layer)
        self.residual_dropout = config.residual_dropout

    def forward(self, x: Tensor, attend: Attend, packed: bool = False, backend: str = "auto") -> Tensor:
        qkv = self.attn.c_attn(self.ln_1(x, backend=backend), packed=packed)
        y = attend(qkv, self.layer, self.scale)
        if packed:  # the product itself adds to x
            x = self.attn.c_proj(y, residual=x, packed=True)
            y = self.ln_2(x, backend=backend)
        else:
            y, x = self.ln_2(self._drop(self.attn.c_proj(y)), residual=x, backend=backend)
        y = self.mlp.up(y, packed, backend)
        if self.training and self.residual_dropout:
            return x + self._drop(self.mlp.c_proj(y))
        return self.mlp.c_proj(y, residual=x, packed=packed)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.residual_dropout) if self.training and self.residual_dropout else x


class Transformer(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        # Uninitialised: `init_weights` follows, and nn.Embedding's own start would draw every number twice.
        wte, wpe = (torch.empty(rows, config.hidden_size) for rows in (config.vocab_size, config.context_length))
        self.wte = nn.Embedding.from_pretrained(wte, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)


class GPT2(nn.Module):
    """GPT-2 language model: `model(input_ids)` maps (B, T) token ids to (B, T, V) logits.

    Build it from sizes, `GPT2(vocab_size=10000, hidden_size=256, num_layers=6, num_heads=8, feedforward_dim=1024,
    dropout_rate=0.1)`, from a configuration, `GPT2(GPT2Config(...))`, from a name, `GPT2.from_config("gpt2-medium")`,
    or from a checkpoint, `GPT2.from_pretrained("gpt2")`. `dropout_rate` sets the three dropouts of the configuration;
    any other keyword is a field of `GPT2Config`. `backend` chooses the kernels: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        config: GPT2Config | None = None,
        *,
        dropout_rate: float | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, GPT2Config):
            raise TypeError(f"GPT2: config must be a GPT2Config; got {type(config).__name__}; name sizes by keyword")
        if config is not None and (fields or dropout_rate is not None):
            names = [*fields, *(["dropout_rate"] if dropout_rate is not None else [])]
            raise TypeError(f"GPT2: give a config or its fields, not both; got a config and {', '.join(names)}")
        if config is None:
            unknown = sorted(set(fields) - set(GPT2Config.__dataclass_fields__))
            if unknown:
                raise TypeError(f"GPT2: unknown argument {', '.join(unknown)}; see GPT2Config for the fields there are")
            if dropout_rate is not None:
                for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
                    fields.setdefault(name, dropout_rate)
            config = GPT2Config(**fields)
        ops.check_backend(backend)
        self.config = config
        self.backend = backend
        self.tokenizer: Tokenizer | None = None
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # Where a checkpoint is to be loaded there is nothing to initialise, and trying imports half of PyTorch.
        if self.device.type != "meta":
            self.init_weights()

    @classmethod
    def from_config(cls, config: GPT2Config | str, *, backend: str = "auto", **changes: Any) -> GPT2:
        """A model with fresh weights from a configuration or a preset's name; `changes` override fields."""
        named = GPT2Config.preset(config, **changes) if isinstance(config, str) else config.replace(**changes)
        return cls(named, backend=backend)

    # -- weights ------------------------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.register_parameter("weight", self.transformer.wte.get_parameter("weight"))

    def init_weights(self) -> None:
        """GPT-2's initialisation: normal weights, residual projections scaled by 1/sqrt(2 L), zero biases."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if ".act." in name:
                continue  # learned activations start where they were built
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.num_layers))
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def pack(self) -> bool:
        """Lay the linear layers' weights out for generation on a CPU; False where this machine or dtype has no layout.

        Kept beside the weights (as much memory again) until `train()` or `unpack()`; packing again after the weights
        have changed packs what changed.
        """
        if not ops.can_pack(self.lm_head.weight):
            return False
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        return True

    def unpack(self) -> None:
        """Drop what `pack` made."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.unpack()

    def train(self, mode: bool = True) -> GPT2:
        if mode:
            self.unpack()
        return super().train(mode)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of token ids (B, T), int64 or int32.

        cache: the ids are new tokens of the cache's B slots, appended to it (evaluation only); rows may hold
        different lengths. position_ids (B, T) replace 0 .. T-1. cu_seqlens: see `hidden_states`.
        """
        if cache is None:
            return self.lm_head(self.hidden_states(input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens))
        if position_ids is not None or cu_seqlens is not None:
            raise ValueError("GPT2: a cache knows its positions; position_ids and cu_seqlens cannot be given with it")
        self._check_ids(input_ids)
        B, T = input_ids.shape
        if cache.num_slots != B:
            raise ValueError(f"GPT2: input_ids has {B} rows and the cache {cache.num_slots} slots; they must agree")
        if T == 0:
            return self.lm_head(input_ids.new_zeros((B, 0, self.config.hidden_size), dtype=self.dtype))
        plan = ops.plan_rows(range(B), [T] * B, cache.lengths, self.device)
        return self.lm_head(self.extend(input_ids.reshape(-1), plan, cache)).view(B, T, -1)

    def hidden_states(
        self, input_ids: Tensor, *, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) after the last LayerNorm, what the head turns into logits.

        cu_seqlens (documents + 1,): the one row (B = 1) holds documents laid end to end; none sees another, and
        positions start at 0 in each.
        """
        self._check_ids(input_ids)
        T = input_ids.shape[1]
        context = self.config.context_length
        documents = None if cu_seqlens is None else ops.plan_documents(cu_seqlens.to(self.device), T)
        if position_ids is None and documents is not None:
            position_ids = (torch.arange(T, device=self.device) - documents.starts)[None]
        elif position_ids is None:
            if context < T:
                raise ValueError(f"GPT2: {T} tokens do not fit in the context of {context}; shorten the input")
            position_ids = torch.arange(T, device=input_ids.device).expand_as(input_ids)
        elif position_ids.shape != input_ids.shape or position_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"GPT2: position_ids must be integers of shape {tuple(input_ids.shape)}; "
                f"got {position_ids.dtype} {tuple(position_ids.shape)}"
            )
        self._check_range(position_ids, context, "positions", "the context")
        dropout_p = self.config.attention_dropout if self.training else 0.0

        def attend(qkv: Tensor, layer: int, scale: float) -> Tensor:
            return ops.causal_attention_packed(
                qkv,
                self.config.num_heads,
                scale=scale,
                dropout_p=dropout_p,
                cu_seqlens=documents,
                upcast=self.config.reorder_and_upcast_attn,
                backend=self.backend,
            )

        return self._run_blocks(input_ids, position_ids, attend)

    @torch.no_grad()
    def extend(self, token_ids: Tensor, plan: ops.RowPlan, cache: KVCache, *, packed: bool = False) -> Tensor:
        """Append new tokens to rows of `cache`: token_ids (N,) laid row after row as `plan` says -> hidden (N, C).

        Rows of any lengths and numbers of new tokens go together without padding; prefill and decoding are both this.
        Not for training mode. `packed` uses the weights that `pack` laid out. ValueError past the context; the cache
        is then as it was.
        """
        if self.training:
            raise ValueError("GPT2: a cache is for evaluation; call model.eval() first")
        self._check_range(token_ids, self.config.vocab_size, "token ids", "the vocabulary")
        needed = max((past + count for _, count, past in plan.rows), default=0)
        if needed > self.config.context_length:
            raise ValueError(f"GPT2: {needed} tokens do not fit in the context of {self.config.context_length}")
        cache.reserve(needed)

        num_tokens = token_ids.shape[0]
        # Packed weights want a few rows at least: filled up once here, not in every linear layer.
        filler = max(0, ops.MIN_PACKED_ROWS - num_tokens) if packed else 0

        def attend(qkv: Tensor, layer: int, scale: float) -> Tensor:
            attended = ops.cached_attention(
                qkv[:num_tokens],
                cache.keys[layer],
                cache.values[layer],
                plan,
                scale=scale,
                upcast=self.config.reorder_and_upcast_attn,
                backend=self.backend,
            )
            return F.pad(attended, (0, 0, 0, filler)) if filler else attended

        positions = plan.positions
        if filler:
            token_ids, positions = F.pad(token_ids, (0, filler)), F.pad(positions, (0, filler))
        hidden = self._run_blocks(token_ids, positions, attend, packed)[:num_tokens]
        for slot, count, past in plan.rows:
            cache.lengths[slot] = past + count
        return hidden

    def _run_blocks(self, input_ids: Tensor, position_ids: Tensor, attend: Attend, packed: bool = False) -> Tensor:
        x = self.transformer.wte(input_ids) + self.transformer.wpe(position_ids)
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        for block in self.transformer.h:
            x = block(x, attend, packed, self.backend)
        return self.transformer.ln_f(x, backend=self.backend)

    def _check_ids(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"GPT2: input_ids must be a (B, T) tensor of token ids; got {got}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT2: input_ids must be int64 or int32; got {input_ids.dtype}")
        if input_ids.device != self.device:
            raise ValueError(f"GPT2: input_ids are on {input_ids.device}, the model is on {self.device}")
        self._check_range(input_ids, self.config.vocab_size, "token ids", "the vocabulary")

    @staticmethod
    def _check_range(values: Tensor, limit: int, what: str, of: str) -> None:
        # On a GPU a look at the values would wait for the device; the embedding itself then reports them.
        if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
            return
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"GPT2: {what} must be in [0, {limit}) ({of}); got {low if low < 0 else high}")

    # -- conveniences that live in the layers above -----------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **options: Any) -> GPT2:
        """Load a checkpoint folder, file or hub name; see `fastgpt2.checkpoint.load_pretrained`."""
        from fastgpt2.checkpoint import load_pretrained

        return load_pretrained(name_or_path, **options)

    def save_pretrained(self, path: str | PathLike[str], **options: Any) -> None:
        """Write a folder that transformers loads; see `fastgpt2.checkpoint.save_pretrained`."""
        from fastgpt2.checkpoint import save_pretrained

        save_pretrained(self, path, **options)

    def generate(self, prompts: Iterable[str] | Iterable[Sequence[int]] | Tensor, **options: Any) -> list[Sample]:
        """Continue prompts of any lengths; see `fastgpt2.generate.generate`."""
        from fastgpt2.generate import generate

        return generate(self, prompts, **options)

    def generate_iter(
        self, prompts: Iterable[str] | Iterable[Sequence[int]] | Tensor, **options: Any
    ) -> Iterator[Sample]:
        """Yield finished samples as they end; see `fastgpt2.generate.generate_iter`."""
        from fastgpt2.generate import generate_iter

        return generate_iter(self, prompts, **options)

    def stream(self, prompts: Iterable[str] | Iterable[Sequence[int]] | Tensor, **options: Any) -> Iterator[TokenEvent]:
        """Yield every token as it is chosen; see `fastgpt2.generate.stream`."""
        from fastgpt2.generate import stream

        return stream(self, prompts, **options)
