"""Shares among tenants, on a virtual clock: a flood of one holds up no other, neither in the queue nor in the cache."""

from jilju.assemble.simulation import RooflineBackend
from jilju.simulation import Script, World
from jilju.simulation.script import Settings, SimRequest

SETTINGS = Settings(num_blocks=64, block_size=16, max_rows=4, max_tokens=64, max_context=256, vocab_size=40)
PERIOD_US = 60_000


def calm(count: int, prompt: list[int] | None = None) -> list[SimRequest]:
    """A tenant that asks now and then."""
    return [
        SimRequest(id=f"calm{i}", at_us=1000 + i * PERIOD_US, prompt_ids=prompt or [i % 40] * 20, max_tokens=16, seed=i, tenant="calm", salt="calm")
        for i in range(count)
    ]  # fmt: skip


def flood(count: int, prompt_tokens: int = 20) -> list[SimRequest]:
    return [
        SimRequest(
            id=f"flood{i}", at_us=i * 10, prompt_ids=[(i * 7 + k) % 40 for k in range(prompt_tokens)], max_tokens=16, seed=i, tenant="flood",
            salt="flood",
        )
        for i in range(count)
    ]  # fmt: skip


def took_ms(requests: list[SimRequest], tenant: str) -> list[float]:
    world = World(Script(seed=1, settings=SETTINGS, requests=requests), RooflineBackend())
    world.run()
    assert all(caller.end == "completed" for caller in world.callers)
    return [(c.call.ended_ns - c.call.received_ns) / 1e6 for c in world.callers if c.spec.tenant == tenant]


def test_a_flood_does_not_hold_up_who_asks_now_and_then():
    alone = max(took_ms(calm(20), "calm"))
    beside = took_ms([*flood(300), *calm(20)], "calm")
    flooding = took_ms([*flood(300), *calm(20)], "flood")
    # it waits for one of the flood's to end, and computes beside three: no queue of three hundred
    assert max(beside) < 6 * alone
    assert max(flooding) > 10 * max(beside)


def test_an_eviction_flood_leaves_a_tenant_its_floor():
    prompt = list(range(40)) * 4  # ten blocks of 64; the floor of one of two tenants is sixteen
    requests = [*calm(20, prompt), *flood(300, prompt_tokens=100)]
    world = World(Script(seed=1, settings=SETTINGS, requests=requests), RooflineBackend())
    cached: list[int] = []
    close = world._close

    def watch(stream, event):
        if stream.call.spec.tenant == "calm":
            cached.append(event.times.num_cached_tokens)
        close(stream, event)

    world._close = watch
    world.run()
    assert cached[0] == 0 and min(cached[1:]) == 144  # all full blocks but the last token's
