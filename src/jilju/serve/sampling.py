"""The generation fields that chat and completions share, and what becomes of them.

Owns their types, ranges and off values, and the way from them to SamplingParams, with the model's defaults for what a call
leaves out. Knows nothing of messages, prompts or answers.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from jilju.engine.request import MAX_BIAS, MAX_PATTERN, MAX_PRIORITY, RepetitionDetection, SamplingParams
from jilju.errors import ConflictingParameters, ContextLengthExceeded, InvalidValue, ModelNotFound, UnsupportedParameter
from jilju.plan.batch import MAX_BIASES, MAX_TOP
from jilju.serve.body import shown_name
from jilju.serve.context import ServerContext
from jilju.serve.errors import shown
from jilju.serve.fields import ANY, Rules, convert, refuse, take_fields
from jilju.serve.structured import ResponseFormat, StructuredOutputs, take_response_format, take_structured_outputs
from jilju.text.tokenizer import Tokenizer

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16  # of a prompt
MAX_BAD_WORDS = 64
MAX_LOGPROB_IDS = 128
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


class LoopFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as a loop: a pattern of so many tokens, so many times in a row."""

    max_pattern_size: Annotated[int, Meta(ge=1, le=MAX_PATTERN)]
    min_pattern_size: Annotated[int, Meta(ge=1, le=MAX_PATTERN)] = 1
    min_count: Annotated[int, Meta(ge=2, le=2**31 - 1)]


STREAM_OPTIONS = Rules.of(StreamOptions, later=MappingProxyType({"include_obfuscation": (False,)}))
LOOP_FIELDS = Rules.of(LoopFields)


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
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] = []
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LOGPROB_IDS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    repetition_detection: LoopFields | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1: what fits
    truncation_side: Literal["left", "right"] = "left"  # which end is cut off
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_prompt_text: bool = False
    return_token_offsets: bool = False  # of a rendering only
    timings: bool = False
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None  # 0, or the key's floor
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

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
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


def take_generation_fields(body: Mapping[str, Any], to: type[F], rules: Rules, ignored: list[str] | None = None) -> F:
    """The typed fields of a body whose own objects (messages, parts) are already reduced to what is taken."""
    taken = take_fields(body, rules, ignored=ignored)
    for name, inner in (("stream_options", STREAM_OPTIONS), ("repetition_detection", LOOP_FIELDS)):
        if isinstance(value := taken.get(name), dict):
            taken[name] = take_fields(value, inner, name, ignored)
    if "response_format" in taken:
        taken["response_format"] = take_response_format(taken["response_format"], ignored)
    if "structured_outputs" in taken:
        taken["structured_outputs"] = take_structured_outputs(taken["structured_outputs"], ignored)
    fields = convert(taken, to)
    _check_together(fields)
    return fields


def _check_together(fields: GenerationFields) -> None:
    """What one field says of another."""
    if fields.stream_options is not None and not fields.stream:
        raise InvalidValue("stream_options is given without stream: true; leave it out", param="stream_options")
    if fields.prompt_logprobs is not None and fields.stream:
        raise ConflictingParameters(
            "prompt_logprobs is given with stream: true; ask for the whole answer", param="prompt_logprobs"
        )
    if fields.truncate_prompt_tokens == 0:
        raise refuse("truncate_prompt_tokens", 0, "1 or more tokens, or -1 for what fits")
    loop = fields.repetition_detection
    if loop is not None and loop.min_pattern_size > loop.max_pattern_size:
        allowed = f"1..{loop.max_pattern_size}, the max_pattern_size"
        raise refuse("repetition_detection.min_pattern_size", loop.min_pattern_size, allowed)


def check_is_run(fields: GenerationFields) -> None:
    """What only a route that renders takes."""
    if fields.return_token_offsets:
        raise UnsupportedParameter(
            "return_token_offsets is true; only a route that renders has offsets; leave it out",
            param="return_token_offsets",
        )


def check_model(model: str | None, context: ServerContext) -> None:
    if model is not None and model != context.model_name:
        raise ModelNotFound(f"model is {shown(model)}; this server has {shown(context.model_name)}", param="model")


def estimated_tokens(num_bytes: int) -> int:
    """Of a text that is not tokenized yet."""
    return max(1, num_bytes // BYTES_PER_TOKEN)


def check_sequences(num_prompts: int, n: int, name: str = "n") -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise refuse(name, n, f"1..{MAX_SEQUENCES // num_prompts} with {num_prompts} prompts, {MAX_SEQUENCES} in all")


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
    _check_ids("logprob_token_ids", fields.logprob_token_ids or [], vocab_size)
    if fields.logprob_token_ids and logprobs is None:
        raise InvalidValue(
            "logprob_token_ids is given without logprobs; ask for them or leave it out", param="logprob_token_ids"
        )
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
        logprob_token_ids=tuple(fields.logprob_token_ids) if fields.logprob_token_ids else None,
        bad_words_ids=bad_words_ids(fields.bad_words, context.tokenizer),
        repetition_detection=_loop(fields.repetition_detection),
    )


def _loop(fields: LoopFields | None) -> RepetitionDetection | None:
    if fields is None:
        return None
    return RepetitionDetection(
        max_pattern_size=fields.max_pattern_size,
        min_pattern_size=fields.min_pattern_size,
        min_count=fields.min_count,
    )


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, as a text begins with it and as it stands behind a space."""
    found = [tokenizer.encode(text) for word in words for text in (word, " " + word.lstrip(" "))]
    return tuple(dict.fromkeys(tuple(ids) for ids in found if ids))


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


def truncated(ids: list[int], fields: GenerationFields, max_tokens: int | None, context_tokens: int) -> list[int]:
    """The prompt as far as the call lets it be cut: the end of it stays, or the beginning."""
    limit = fields.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit == -1:
        limit = max(1, context_tokens - (1 if max_tokens is None else max_tokens))
    if len(ids) <= limit:
        return ids
    return ids[-limit:] if fields.truncation_side == "left" else ids[:limit]


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
