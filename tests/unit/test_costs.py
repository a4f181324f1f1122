"""Prices, and the budget that calls in flight cannot pass, held against the server's own ledger."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from router_cli.costs import Budget, BudgetReached, Prices, dollars, price
from router_cli.errors import SettingsError, TeacherError
from router_cli.schema import Task
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.teachers.openai import OpenAITeacher
from tests.fake_teacher import Call, FakeTeacher, Reply, Storm

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))


def teacher(url: str, **values: Any) -> OpenAITeacher:
    options = {key.replace("__", "."): ("test", value) for key, value in values.items()}
    settings = load({"endpoint.base_url": ("test", url), **options}, environ={})
    return OpenAITeacher(settings, backoff=0.002)


async def ask_all(asked: OpenAITeacher, tasks: int) -> list[Any]:
    try:
        asks = [asked.ask(Task(id=str(i), text=f"task {i}"), SPACE, "balanced") for i in range(tasks)]
        return await asyncio.gather(*asks, return_exceptions=True)
    finally:
        await asked.close()


def test_prices_of_the_user_beat_the_list_and_go_in_pairs() -> None:
    assert Prices().of("gpt-4o", 1_000_000, 0) == pytest.approx(2.5)
    assert Prices(1.0, 4.0).of("gpt-4o", 1_000_000, 500_000) == pytest.approx(3.0)
    assert Prices(0.0, 0.0).of("my-own-model", 10, 10) == 0.0
    assert Prices().of("my-own-model", 10, 10) is None is price("my-own-model", 10, 10)
    with pytest.raises(SettingsError, match="price-out"):
        Prices(price_in=1.0)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini", "gemini-2.5-pro", "claude-sonnet-4-5"])
@pytest.mark.parametrize("tokens", [(0, 0), (700, 40), (31_999, 16_384), (250_000, 10)])
def test_the_quick_price_is_the_lists(model: str, tokens: tuple[int, int]) -> None:
    from genai_prices import Usage, calc_price

    listed = calc_price(Usage(input_tokens=tokens[0], output_tokens=tokens[1]), model_ref=model).total_price
    assert price(model, *tokens) == pytest.approx(float(listed), rel=1e-12)


def test_small_sums_keep_four_places() -> None:
    assert [dollars(one) for one in (None, 0.01234, 1234.5)] == ["unknown price", "$0.0123", "$1,234.50"]


def test_a_reservation_waits_for_calls_in_flight_and_is_refused_once_none_can_free_enough() -> None:
    async def run() -> None:
        budget = Budget(1.0)
        await budget.reserve(0.6)
        waiting = asyncio.create_task(budget.reserve(0.6))
        await asyncio.sleep(0)
        assert not waiting.done()
        budget.settle(0.6, 0.1)
        await waiting
        late = asyncio.create_task(budget.reserve(0.5))
        await asyncio.sleep(0)
        budget.settle(0.6, 0.6)
        with pytest.raises(BudgetReached, match=r"\$1\.00 is reached: \$0\.7000 are spent"):
            await late
        assert (budget.spent, budget.reserved) == (pytest.approx(0.7), 0.0)
        with pytest.raises(BudgetReached):
            await budget.reserve(0.31)

    asyncio.run(run())


def test_who_waits_is_served_in_order_and_may_leave() -> None:
    async def run() -> None:
        budget, order = Budget(1.0), list[int]()

        async def want(number: int) -> None:
            await budget.reserve(0.9)
            order.append(number)
            budget.settle(0.9, 0.0)

        await budget.reserve(0.9)
        waiting = [asyncio.create_task(want(number)) for number in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        budget.settle(0.9, 0.0)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == [0, 2, 3] and budget.reserved == 0.0

    asyncio.run(run())


def test_what_may_have_been_paid_is_booked_as_uncertain() -> None:
    budget = Budget(1.0)
    asyncio.run(budget.reserve(0.4))
    budget.settle(0.4, 0.4, certain=False)
    assert (budget.spent, budget.uncertain) == (0.4, 0.4)


def test_a_hundred_random_budgets_are_never_passed() -> None:
    """By the server's own ledger, which charges for what it dropped too; calls fail, are cut, invalid and repeated."""
    rng = random.Random(11)
    spent_well = 0
    for number in range(100):
        limit = rng.uniform(0.0, 0.15)
        storm = Storm(seed=number, busy=0.0, hung=0.0, reset=0.1, cut=0.1)  # refusals cost nothing but time
        with FakeTeacher(behave=storm, bill_lost=True) as server:
            asked = teacher(server.url, label__max_cost=limit, label__temperature=1.0)
            answers = asyncio.run(ask_all(asked, 8))
        assert server.cost <= limit + 1e-9
        assert asked.budget.spent >= server.cost - 1e-9 and asked.budget.reserved == pytest.approx(0.0, abs=1e-9)
        stopped = [answer for answer in answers if isinstance(answer, BudgetReached)]
        assert all(not isinstance(answer, Exception) or answer in stopped for answer in answers)
        spent_well += server.cost > 0
    assert spent_well > 50, "budgets that let nothing through prove nothing"


def test_a_cap_needs_a_known_price() -> None:
    with FakeTeacher() as server:
        with pytest.raises(SettingsError, match=r"label\.max_cost \(test\): the price of my-own is unknown"):
            teacher(server.url, label__max_cost=1.0, label__model="my-own")
        priced = teacher(
            server.url, label__max_cost=1.0, label__model="my-own", label__price_in=1.0, label__price_out=1.0
        )
        [answer] = asyncio.run(ask_all(priced, 1))
    assert answer.usage.cost_usd == pytest.approx(440e-6) == priced.budget.spent


def test_a_cap_cannot_be_kept_where_answers_have_no_limit() -> None:
    def behave(call: Call) -> Reply | None:
        for name in ("max_tokens", "max_completion_tokens"):
            if name in call.body:
                return Reply(status=400, error={"message": f"{name} is not supported", "param": name})
        return None

    with FakeTeacher(behave=behave) as server:
        [error] = asyncio.run(ask_all(teacher(server.url, label__max_cost=1.0), 1))
        assert isinstance(error, TeacherError) and "--max-cost cannot be kept" in str(error)
        assert server.cost == 0.0


def test_a_dearer_model_behind_an_alias_raises_what_is_reserved() -> None:
    with FakeTeacher(Reply(model="gpt-4-32k")) as server:
        asked = teacher(server.url, label__max_cost=100.0)
        before = asked._worst([{"content": "a"}], {"max_tokens": 100})
        asyncio.run(ask_all(asked, 1))
    assert asked._worst([{"content": "a"}], {"max_tokens": 100}) > 3 * before


def test_the_estimate_is_near_the_bill_after_a_pilot_of_twenty() -> None:
    """The endpoint's tokens are others than ours, and a sixth of its answers has to be asked for again."""
    storm = Storm(seed=3, busy=0.0, down=0.0, reset=0.0, hung=0.0, cut=0.0)

    async def run(url: str) -> tuple[float, float]:
        asked = teacher(url)
        tasks = [Task(id=str(i), text=f"task {i} " + "with some more words " * (i % 9)) for i in range(120)]
        try:
            for task in tasks[:20]:
                await asked.ask(task, SPACE, "balanced")
            foreseen = sum(asked.expected(task, SPACE, "balanced").cost_usd or 0.0 for task in tasks[20:])
            before = asked.budget.spent
            for task in tasks[20:]:
                await asked.ask(task, SPACE, "balanced")
            assert asked.tokenizer == "o200k_base" and asked.count_error is not None
            return foreseen, asked.budget.spent - before
        finally:
            await asked.close()

    with FakeTeacher(behave=storm) as server:
        foreseen, bill = asyncio.run(run(server.url))
    assert abs(foreseen - bill) <= 0.1 * bill
