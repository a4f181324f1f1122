"""The offline teacher: written rules after the rubric of data/README.md; no model, no network, always the same answer.

A text, English or Chinese, is searched for the cues of `cues.CUES`: how far it is one artefact, stages in an order,
separate pieces, or parts to be designed together. Each cue speaks for one topology, with a weight a hit and a greatest
number of hits that count. Weights add up, the greatest sum wins, and in a tie the cheaper topology.

A programming exercise (a function's signature with a docstring, as in HumanEval) is one function, one agent's work by
the rubric. Among exercises the question is instead which roles the docstring gives work besides the builder:

    tester    four or more words of condition (if, unless, only, empty, ...): the cases have to be told apart;
              or an earlier function is given in full, which the new one has to fit
    planner   two or more notions defined, formats or rules listed, to be understood before anything is coded

With neither it is single, else a chain planner, builder, tester of those with work. Where many cases and notions meet
in a search for the best (two or more words like shortest, largest, possible), which stages in a fixed order do not
settle, the planner manages: centralized.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from router_cli.errors import SettingsError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace
from router_cli.teachers.cues import CUES, DENIED, clauses, longest_list

LONGEST = 20_000
"""Characters that are looked at: a task says what it is about long before, and the time stays bounded."""

RANK = ("single", "chain", "decentralized", "centralized")
"""From the cheapest to the dearest: the order in which ties are broken."""

PRIOR = 1.5
"""What single has before any cue: less than one strong cue for a team, more than a weak one."""

# An exercise: a signature with a docstring, or below a comment as in the translations of HumanEval.
_SIGNATURE = re.compile(r"^[ \t]*(?:async )?(?:def|func(?:tion)?|fn|fun|sub)\s+([\w.]{1,80})\s*\(", re.MULTILINE)
_DOCUMENTED = re.compile(r"\"{3}|'{3}|^[ \t]*(?://|#|--|;|/\*)", re.MULTILINE)
_CONDITION = re.compile(
    r"\b(?:if|otherwise|else|unless|except|when(?:ever)?|only|without|ignor\w+|exactly|at (?:least|most)|until|must"
    r"|not|no|none|empty|negative|invalid)\b",
    re.IGNORECASE,
)
_NOTION = re.compile(
    r"^[ \t]*(?:[-*•@]|\d+[.)]|>? ?\d+\.\d+ )[ \t]*\S|\b(?:(?:is|are|be) (?:considered|called|defined|said|given by)"
    r"|defined as|as follows|consists? of|represent(?:s|ed|ing)?|means?|following|let|format|conditions?|for any"
    r"|in other words|sequence)\b",
    re.IGNORECASE | re.MULTILINE,
)
_SEARCH = re.compile(
    r"\b(?:minim\w+|maxim\w+|(?:short|long|small|larg|few|strong|clos)est|possible|any number|lexicographic\w*"
    r"|ways?)\b",
    re.IGNORECASE,
)
_TEAMWORK = re.compile(
    r"\b(?:compare notes|agree\w*|rank\w*|together|discuss\w*|consensus)\b|商量|谈拢|碰一下|讨论|一起定", re.IGNORECASE
)
_UNKNOWN, _LIVE = (next(cue for cue in CUES if cue.name == name) for name in ("an unknown cause", "a live cut-over"))
_ASKS_WHY = re.compile(r"^\s*(?:why|how (?!about)|which|what|should)\b|为什么|选哪个|怎么(?:选|办)", re.IGNORECASE)
_ASKS_WHETHER = re.compile(r"^\s*(?:does|do|is|are)\b|会不会|有没有|是不是", re.IGNORECASE)
# The chain of a text that names the work of one role only.
_PAIRS = {
    "planner": ["planner", "builder"],
    "builder": ["builder", "tester"],
    "tester": ["tester", "builder"],
    "refractor": ["tester", "refractor"],
}

# What a role of another name may mean: a stem of its name, tried in this order (a code-tester is no coder).
_STEMS = {
    "planner": r"plan|architect|lead|manag|design|analy|coordinat|research|规划|架构|产品",
    "tester": r"test|check|qa|review|verif|valid|critic|audit|测试|审|验",
    "refractor": r"refact|refract|clean|重构|优化",
    "builder": r"build|cod(?:e|ing)|develop|engineer|implement|program|writ|generat|开发|工程|编",
}


def decide(text: str, space: DecisionSpace) -> tuple[Decision, str]:
    """Decide a task by the rules: a decision valid for `space`, and the reason in a few words.

    Raises SettingsError where `space` holds no decision at all (no role, or one role without single).
    """
    text = text[:LONGEST]
    topologies = [name for name in RANK if name in space.topologies and (name == "single" or len(set(space.roles)) > 1)]
    if not topologies or not space.roles:
        raise SettingsError(
            f"decision.topologies: no decision exists for the roles {', '.join(space.roles) or '(none)'} and the "
            f"topologies {', '.join(space.topologies) or '(none)'}; add single, or a second role"
        )
    scores, cues = _judge(text)
    topology = max(topologies, key=lambda name: scores[name])  # the first of equals
    reason = f"{topology}: {', '.join(cues[topology]) or 'nothing speaks for more among the topologies allowed'}"
    wanted, entry, steps = _staff(text, topology)
    cast = _cast(space)
    roles = [cast[meaning] for meaning in wanted if meaning in cast]
    # Roles of unknown meaning step in where too few are known.
    least = 1 if topology == "single" else 2
    roles += [role for role in dict.fromkeys(space.roles) if role not in roles][: max(0, least - len(roles))]
    if topology != "chain":
        roles = list(space.canonical_order(roles))
    first = roles[0] if topology == "chain" or cast.get(entry) not in roles else cast[entry]
    low, high = space.steps(topology, len(roles))
    decision = Decision(
        topology=topology,  # type: ignore[arg-type]  # one of RANK
        roles=tuple(roles),
        manager_role=first if topology == "centralized" else None,
        entry_role=first,
        max_steps=min(max(low, steps(len(roles))), high),
    )
    return decision, reason


def topology_scores(text: str) -> dict[str, float]:
    """The sum of weights of each topology."""
    return _judge(text[:LONGEST])[0]


def _judge(text: str) -> tuple[dict[str, float], dict[str, list[str]]]:
    """The scores of the topologies, and the names of the cues that made them."""
    scores, found = dict.fromkeys(RANK, 0.0), {name: list[str]() for name in RANK}
    if (work := _exercise(text)) is not None:
        notes = list(work.values()) or ["one function with few cases"]
        scores |= {
            "single": 1.0,
            "chain": 2.0 * ("planner" in work or "tester" in work),
            "centralized": 3.0 * ("manager" in work),
        }
        return scores, dict.fromkeys(RANK, notes)
    scores["single"] = PRIOR
    # A denied tie must not be read as a tie.
    untied = DENIED.sub(" ", text)
    for cue in CUES:
        if (hits := cue.count(untied if cue.topology == "centralized" else text)) > 0:
            scores[cue.topology] += cue.weight * min(hits, cue.most)
            found[cue.topology].append(cue.name)
    return scores, found


def _exercise(text: str) -> dict[str, str] | None:
    """Which roles a programming exercise gives work, with the reason; None where the text is no exercise.

    The key `manager` says that nothing but a manager settles it.
    """
    signatures = list(_SIGNATURE.finditer(text))
    if not signatures or not _DOCUMENTED.search(text):
        return None
    name = re.escape(signatures[-1][1])
    after = text[signatures[-1].end() :]
    # Where the signature comes last, the task stands in the comment above it.
    lines = (after if _DOCUMENTED.search(after) else text).splitlines()[1:]
    example = re.compile(rf">>>|=>|➞|==|->|\b{name}\(|^\W*(?:in|out)put\b|^\W*examples?\b", re.IGNORECASE)
    prose = "\n".join(line for line in lines if not example.search(line))
    work = {}
    if len(_NOTION.findall(prose)) >= 2:
        work["planner"] = "notions to be understood first"
    if len(_CONDITION.findall(prose)) >= 4:
        work["tester"] = "many cases"
        if "planner" in work and len(_SEARCH.findall(prose)) >= 2:
            work["manager"] = "a search under rules that meet"
    elif len(signatures) > 1:
        work["tester"] = "an earlier function to fit"
    return work


def _staff(text: str, topology: str) -> tuple[list[str], str, Callable[[int], int]]:
    """Who has work, in order; who enters; and the steps for a number of roles. By the rubric."""
    if (work := _exercise(text)) is not None:
        team: list[str] = [role for role in ("planner", "builder", "tester") if role in work or role == "builder"]
        return (["builder"], "builder", _steps(0, 1)) if topology == "single" else (team, team[0], _steps(1, 1))
    roles = clauses(text)
    named = list(dict.fromkeys(role for _, role in roles if role))
    lead = next((role for role, _ in roles if role), "builder")
    if topology == "single":
        asked = "planner" if _ASKS_WHY.search(text) else "tester" if _ASKS_WHETHER.search(text) else lead
        return [asked], asked, _steps(0, 1)
    if topology == "chain":
        if len(named) < 2:
            named = _PAIRS[named[0] if named else "planner"]
        return named, named[0], _steps(1, 0)
    if topology == "centralized":
        # A mistake is costly where people keep working on what is being replaced.
        checked = "tester" in named or _LIVE.count(text) > 0
        team = ["planner", "builder", *["tester"] * checked, *["refractor"] * ("refractor" in named)]
        # The first of the parts usually ends a longer phrase, so that three short items in a row are four parts.
        many = _UNKNOWN.count(text) or longest_list(text) >= 3
        return team, "planner", _steps(1, 3 if many else 1)
    second = "builder" if lead == "tester" else "tester"
    return [lead, second], lead, _steps(2 if _TEAMWORK.search(text) else 1, 0)


def _steps(each: int, plus: int) -> Callable[[int], int]:
    return lambda roles: each * roles + plus


def _cast(space: DecisionSpace) -> dict[str, str]:
    """Which role of the list stands for which of the rubric's: by its name or alias, else by a stem of its name."""
    cast = {meaning: role for meaning in _STEMS if (role := space.role_named(meaning)) is not None}
    for meaning, stem in _STEMS.items():
        free = (role for role in space.roles if role not in cast.values() and re.search(stem, role, re.IGNORECASE))
        if meaning not in cast and (role := next(free, None)) is not None:
            cast[meaning] = role
    return cast
