"""The generation fields that chat and completions share, and what becomes of them.

Owns their types, ranges and off values, and the way from them to SamplingParams, with the model's defaults for what a call
leaves out. Knows nothing of messages, prompts or answers.
"""

import hashlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from jilju.engine.request import MAX_BIAS, MAX_PRIORITY, SamplingParams
from jilju.errors import ContextLengthExceeded, InvalidValue, ModelNotFound
from jilju.plan.batch import MAX_BIASES
from jilju.serve.body import shown_name
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, convert, refuse, take_fields

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16  # of a prompt
MAX_SEQUENCES = 128  # of a call: prompts x n
MAX_DEADLINE_MS = 600_000
BYTES_PER_TOKEN = 3  # of text, as long as it is not tokenized; few tokenizers stay below that
TOKEN_KEY = re.compile("0|[1-9][0-9]{0,9}", re.ASCII)

Count = Annotated[int, Meta(ge=0, le=2**53)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Label = Annotated[str, Meta(max_length=128)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


N = TypeVar("N", int, float)


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


STREAM_OPTIONS = Rules.of(StreamOptions, later=MappingProxyType({"include_obfuscation": (False,)}))


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Count = 0
    ignore_eos: bool = False
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Any] = {}
    allowed_token_ids: list[TokenId] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] = []
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    timings: bool = False
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    max_queue_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    request_id: Label | None = None
    session_id: Label | None = None


F = TypeVar("F", bound=GenerationFields)

NO_OPS: Mapping[str, Any] = MappingProxyType(
    {
        "user": ANY,
        "metadata": ANY,
        "store": (False,),
        "service_tier": ANY,
        "safety_identifier": ANY,
        "prompt_cache_key": ANY,
        "prompt_cache_retention": ANY,
        "prompt_cache_options": ANY,
        "client_metadata": ANY,
        "return_mm_kwargs": ANY,
        "verbosity": ("medium",),
        "modalities": (["text"],),
        "spaces_between_special_tokens": (True,),
    }
)

LATER: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "bad_words": ([],),
        "logprob_token_ids": ([],),
        "prompt_logprobs": (),
        "echo": (False,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "include_stop_str_in_output": (False,),
        "truncate_prompt_tokens": (),
        "truncation_side": ("left",),
        "repetition_detection": (),
        "stream_interval": (1,),
        "return_tokens_as_token_ids": (False,),
        "return_prompt_text": (False,),
        "return_token_offsets": (False,),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json_object": (False,),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "structural_tag": (),
        "whitespace_pattern": (),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "vllm_xargs": ({},),
        "watermarking": (False,),
        "moderation": (),
    }
)


def take_generation_fields(body: Mapping[str, Any], to: type[F], rules: Rules) -> F:
    """The typed fields of a body whose own objects (messages, parts) are already reduced to what is taken."""
    taken = take_fields(body, rules)
    if isinstance(options := taken.get("stream_options"), dict):
        taken["stream_options"] = take_fields(options, STREAM_OPTIONS, "stream_options")
    fields = convert(taken, to)
    if fields.stream_options is not None and not fields.stream:
        raise InvalidValue("stream_options is given without stream: true; leave it out", param="stream_options")
    return fields


def check_model(model: str | None, context: ServerContext) -> None:
    if model is not None and model != context.model_name:
        raise ModelNotFound(f"model is {shown(model)}; this server has {shown(context.model_name)}", param="model")


def estimated_tokens(num_bytes: int) -> int:
    """Of a text that is not tokenized yet."""
    return max(1, num_bytes // BYTES_PER_TOKEN)


def check_sequences(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise refuse("n", n, f"1..{MAX_SEQUENCES // num_prompts} with {num_prompts} prompts, {MAX_SEQUENCES} in all")


def choice_seed(seed: int, choice: int) -> int:
    """Of a prompt's choice; the first has the seed itself, so that it is the answer that a call with n = 1 gets."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(b"%d %d" % (seed, choice), digest_size=8, person=b"jilju-seed").digest()
    return int.from_bytes(digest, "big") >> 11


def stops_of(fields: GenerationFields) -> tuple[str, ...]:
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)


def sampling_params(
    fields: GenerationFields, context: ServerContext, *, max_tokens: int, logprobs: int | None, seed: int
) -> SamplingParams:
    vocab_size = context.tokenizer.vocab_size
    _check_ids("stop_token_ids", fields.stop_token_ids, vocab_size)
    if fields.allowed_token_ids is not None:
        if len(fields.allowed_token_ids) > vocab_size:
            given = f"a list of {len(fields.allowed_token_ids)} ids"
            raise refuse("allowed_token_ids", given, f"at most as many as the vocabulary has, {vocab_size}")
        _check_ids("allowed_token_ids", fields.allowed_token_ids, vocab_size)
    if fields.top_k is not None and fields.top_k > vocab_size:
        raise refuse("top_k", fields.top_k, f"1..{vocab_size}, or 0 or -1 for off")
    if fields.min_tokens > max_tokens:
        raise refuse("min_tokens", fields.min_tokens, f"0..{max_tokens}, the most tokens that this answer may have")
    defaults = context.defaults
    return SamplingParams(
        temperature=_or(fields.temperature, defaults.temperature),
        top_k=max(0, _or(fields.top_k, defaults.top_k)),
        top_p=_or(fields.top_p, defaults.top_p),
        min_p=_or(fields.min_p, defaults.min_p),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=_logit_bias(fields.logit_bias, vocab_size),
        allowed_token_ids=None if fields.allowed_token_ids is None else tuple(fields.allowed_token_ids),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        stop=stops_of(fields),
        stop_token_ids=tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        logprobs=logprobs,
    )


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise refuse(f"{name}[{index}]", token_id, f"an id of the vocabulary, 0..{vocab_size - 1}")


def _logit_bias(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    """{"42": -100}: the keys of a JSON object are strings."""
    if len(given) > MAX_BIASES:
        raise refuse("logit_bias", f"an object of {len(given)} ids", f"at most {MAX_BIASES}")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        where = f"logit_bias.{shown_name(key)}"
        if not TOKEN_KEY.fullmatch(key) or int(key) >= vocab_size:
            raise refuse("logit_bias", key, f"keys that are ids of the vocabulary, 0..{vocab_size - 1}")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise refuse(where, bias, f"a number, -{MAX_BIAS}..{MAX_BIAS}")
        biases[int(key)] = float(bias)
    return biases


def end_ids(params: SamplingParams, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that end a sequence, each once."""
    return tuple(dict.fromkeys((() if params.ignore_eos else eos_ids) + params.stop_token_ids))


def fit_max_tokens(
    num_prompt_tokens: int,
    max_tokens: int | None,
    context_tokens: int,
    *,
    prompt: str,
    max_tokens_name: str = "max_tokens",
) -> int:
    """`max_tokens`, or what is left of the context; refuses what does not fit, never cuts. Fields' names are for the error."""
    if max_tokens is None:
        if num_prompt_tokens >= context_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens and the context holds {context_tokens}, "
                "prompt and output together; send a shorter prompt",
                param=prompt,
            )
        return context_tokens - num_prompt_tokens
    if num_prompt_tokens + max_tokens > context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens and {max_tokens_name} is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}; the context holds {context_tokens}; send a shorter prompt or ask for less",
            param=prompt if num_prompt_tokens > context_tokens else max_tokens_name,
        )
    return max_tokens


def _or(value: N | None, default: N) -> N:
    return default if value is None else value
