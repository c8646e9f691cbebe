"""The class LLM: batches, streams, stops, seeds, errors; with the small real model."""

import msgspec
import pytest

from jilju import LLM, RepetitionDetection, SamplingParams
from jilju.engine.loop import MAX_REQUESTS
from jilju.errors import ContextLengthExceeded, EmptyPrompt, InvalidValue, NoAllowedToken
from tests.system.conftest import needs_smollm2

pytestmark = needs_smollm2
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    with LLM("smollm2-135m", context=512, kv_memory="64MiB") as model:
        yield model


def test_completions_stand_in_the_order_of_the_prompts(llm):
    prompts = ["The sky is", "Two plus two is", "The capital of France is"]
    together = llm.generate(prompts, GREEDY)
    assert [c.prompt for c in together] == prompts
    assert [c.text for c in together] == [llm.generate(p, GREEDY)[0].text for p in prompts]
    assert "Paris" in together[2].text


def test_stream_joins_to_the_whole(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0]
    pieces = list(llm.stream("Once upon a time", GREEDY))
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.token_id for p in pieces if p.token_id is not None] == whole.token_ids
    assert [p.completion is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_token_ids_are_a_prompt(llm):
    ids = llm.text.tokenizer.encode("The sky is")
    assert llm.generate(ids, GREEDY)[0].token_ids == llm.generate("The sky is", GREEDY)[0].token_ids
    assert [c.prompt_ids for c in llm.generate([ids, ids[:2]], GREEDY)] == [ids, ids[:2]]


def test_a_drawn_seed_gives_the_same_completion_again(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12)
    drawn = llm.generate("The sky is", params)[0]
    again = llm.generate("The sky is", SamplingParams(temperature=1.0, max_tokens=12, seed=drawn.seed))[0]
    assert again.token_ids == drawn.token_ids


def test_stop_string_ends_the_text_before_it(llm):
    free = llm.generate("Count: one, two, three,", SamplingParams(temperature=0.0, max_tokens=24))[0].text
    word = free[len(free) // 2 :][:3]
    stopped = llm.generate("Count: one, two, three,", SamplingParams(temperature=0.0, max_tokens=24, stop=(word,)))[0]
    assert stopped.text == free[: free.index(word)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)


def test_stop_token_id_is_the_reason(llm):
    free = llm.generate("The sky is", GREEDY)[0].token_ids
    stopped = llm.generate("The sky is", SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(free[4],)))[0]
    assert stopped.token_ids == free[: free.index(free[4]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", free[4])


def test_max_tokens_zero_is_an_empty_text(llm):
    done = llm.generate("The sky is", SamplingParams(max_tokens=0))[0]
    assert (done.text, done.token_ids, done.finish_reason) == ("", [], "length")


def test_default_params_run_to_the_end_of_the_context_at_most(llm):
    assert llm.defaults.temperature == pytest.approx(0.2)
    done = llm.generate([5] * 500)[0]
    assert len(done.token_ids) <= 12
    assert len(done.prompt_ids) + len(done.token_ids) <= 512


def test_leaving_a_stream_frees_the_engine(llm):
    for piece in llm.stream("Once upon a time", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)):
        if piece.index == 0:
            break
    assert llm.generate("The sky is", GREEDY)[0].text
    assert llm.engine.status().num_blocks_held == 0


def test_streams_read_in_turns_are_whole(llm):
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    alone = {prompt: llm.generate(prompt, params)[0].text for prompt in ("The sky is", "Two plus two is")}
    streams = [llm.stream(prompt, params) for prompt in alone]
    texts = ["".join(piece.text for piece in pieces) for pieces in zip(*streams, strict=True)]
    assert len(texts) == 20
    first = llm.stream("The sky is", params)
    begin = next(first).text
    assert llm.generate("Two plus two is", params)[0].text == alone["Two plus two is"]
    assert begin + "".join(piece.text for piece in first) == alone["The sky is"]


def test_a_stream_that_nobody_reads_costs_nothing(llm):
    unread = llm.stream("The sky is", SamplingParams(max_tokens=200))
    assert not llm.engine.has_work()
    half_read = llm.stream("The sky is", SamplingParams(max_tokens=200, ignore_eos=True))
    next(half_read)
    del unread, half_read
    assert not llm.engine.has_work()


def test_a_list_as_stop_is_as_good_as_a_tuple(llm):
    assert llm.generate("Count: one, two,", SamplingParams(temperature=0.0, stop=["zzz"]))[0].text


def test_more_prompts_than_an_engine_queues(llm):
    done = llm.generate([[5]] * (MAX_REQUESTS + 5), SamplingParams(temperature=0.0, max_tokens=0))
    assert len(done) == MAX_REQUESTS + 5
    assert {c.finish_reason for c in done} == {"length"}


def test_logprobs_are_there_when_asked_for(llm):
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    done = llm.generate("The sky is", params)[0]
    assert done.logprobs is not None
    assert [t.token_id for t in done.logprobs] == done.token_ids == [t.top[0][0] for t in done.logprobs]
    assert all(t.logprob == t.top[0][1] >= t.top[1][1] for t in done.logprobs)
    assert llm.generate("The sky is", GREEDY)[0].logprobs is None


def test_rules_of_tokens_reach_the_engine(llm):
    free = llm.generate("The sky is", GREEDY)[0].token_ids
    banned = next(token_id for token_id in free if token_id not in free[:3])
    params = SamplingParams(
        temperature=0.0, max_tokens=24, logprob_token_ids=[free[0], 5], bad_words_ids=[free[:3], (banned,)],
        repetition_detection=RepetitionDetection(max_pattern_size=2, min_count=3), allowed_token_ids=(*free, 5),
    )  # fmt: skip
    done = llm.generate("The sky is", params)[0]
    got = done.token_ids
    assert got[:2] == free[:2] and got[2] != free[2] and banned not in got
    assert [[token_id for token_id, _ in at.top] for at in done.logprobs] == [[free[0], 5]] * len(got)
    assert done.logprobs[0].top[0] == (got[0], done.logprobs[0].logprob)
    same = llm.generate("The sky is", msgspec.structs.replace(params, allowed_token_ids=(5,)))[0]
    assert (same.token_ids, same.finish_reason) == ([5] * 3, "repetition")


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", GREEDY, EmptyPrompt),
        ([], GREEDY, EmptyPrompt),
        ([10**6], GREEDY, InvalidValue),
        ("x", SamplingParams(temperature=3.0), InvalidValue),
        ("x", SamplingParams(top_p=float("nan")), InvalidValue),
        ("x", SamplingParams(max_tokens=4, min_tokens=5), InvalidValue),
        ("x", SamplingParams(max_tokens=4096), ContextLengthExceeded),
        ([5] * 512, SamplingParams(max_tokens=-1), ContextLengthExceeded),
        ([5] * 500, SamplingParams(max_tokens=-1, min_tokens=13), InvalidValue),
        ("x", SamplingParams(stop_token_ids=(49152,), min_tokens=2), InvalidValue),
        ("x", SamplingParams(stop_token_ids=(-1,)), InvalidValue),
        ("x", SamplingParams(top_k=49153), InvalidValue),
        ("x", SamplingParams(presence_penalty=2.5), InvalidValue),
        ("x", SamplingParams(logit_bias={49152: 1.0}), InvalidValue),
        ("x", SamplingParams(logit_bias={1: -101.0}), InvalidValue),
        ("x", SamplingParams(logit_bias={1: float("nan")}), InvalidValue),
        ("x", SamplingParams(logit_bias={"1": 1.0}), InvalidValue),
        ("x", SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)), InvalidValue),
        ("x", SamplingParams(allowed_token_ids=(-1,)), InvalidValue),
        ("x", SamplingParams(allowed_token_ids=()), NoAllowedToken),
        ("x", SamplingParams(allowed_token_ids=(7,), stop_token_ids=(7,), min_tokens=1), NoAllowedToken),
        ("x", SamplingParams(stop="END"), InvalidValue),
        ("x", SamplingParams(stop=(1,)), InvalidValue),
        ("x", SamplingParams(max_tokens=2.5), InvalidValue),
        ("x", SamplingParams(max_tokens=None), InvalidValue),
        ("x", SamplingParams(temperature=None), InvalidValue),
        ("x", SamplingParams(temperature="1"), InvalidValue),
        ("x", SamplingParams(seed=1.5), InvalidValue),
        ("x", SamplingParams(bad_words_ids=((49152,),)), InvalidValue),
        ("x", SamplingParams(logprob_token_ids=(49152,)), InvalidValue),
        ("x", SamplingParams(repetition_detection=RepetitionDetection(max_pattern_size=1, min_count=1)), InvalidValue),
        ([5] * 600, None, ContextLengthExceeded),
    ],
)
def test_wrong_calls_say_what_is_wrong(llm, prompt, params, error):
    prompts = [prompt] if prompt == [] else prompt
    with pytest.raises(error):
        llm.generate(prompts, params)
    assert not llm.engine.has_work()


def test_chat_uses_the_models_template(llm):
    done = llm.chat([{"role": "user", "content": "Say hello."}], GREEDY)
    assert done.text
    assert len(done.prompt_ids) > 20, "the template adds its system prompt and markers"
