"""A good file of every format, one field damaged at a time: an error names record and field as the file spells it.

The table of what was damaged and what was found stands in docs/data.md.
"""

import json
import re
from pathlib import Path

import pytest

from amopo_fast.data.pairs import Reading, read_records
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
DELETED = object()
DAMAGE = {
    "deleted": DELETED,
    "null": None,
    "a number": 3,
    "text": "text",
    "empty text": "",
    "blanks": " \n",
    "true": True,
    "an empty list": [],
    "a list": [3],
    "a mapping": {"a": 1},
    "not a number": float("nan"),
    "infinite": float("inf"),
    "far too high": 99,
    "half a character": "So \ud83d",
}


def side(text, *scores):
    return {"response": text, "helpfulness": scores[0], "correctness": scores[1]}


def turn(role, text):
    return {"role": role, "content": text}


def rating(text, score, stars):
    aspects = {name: {"Rating": stars} for name in ("helpfulness", "truthfulness")}
    return {"response": text, "overall_score": score, "annotations": aspects}


TALK = [turn("system", "Be brief."), turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "Who?")]
COLUMNS = {"helpfulness_chosen": 4, "helpfulness_rejected": 2, "correctness_chosen": 5, "correctness_rejected": 1}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": 1}}}
AMOPO = {"prompt": "Who?", "chosen": side("Ada.", 4, 5), "rejected": side("Bob.", 2, 1)}
TRL = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Bob.", **COLUMNS}
DIMENSIONS = ("no_object", "helpfulness", "correctness")
HELPSTEER = ("no_object", "helpfulness", "correctness")
# name: records, of which each is damaged; dimensions; the fields that are looked at, as a pattern of their paths
GOOD = {
    "amopo": ([AMOPO] * 3, DIMENSIONS, r"prompt|(chosen|rejected)(\..*)?"),
    "amopo, a conversation": (
        [{**AMOPO, "prompt": TALK, "tools": TOOLS, "chat_template_kwargs": {"think": True}}] * 3, DIMENSIONS,
        r"prompt.*|tools.?0?|chat_template_kwargs",
    ),
    "amopo, system and history": (
        [{**AMOPO, "system": "Be brief.", "history": [["Hello", "Hi."]]}] * 3, DIMENSIONS, r"system|history.*"
    ),
    "trl": ([TRL] * 3, DIMENSIONS, r".*"),
    "trl, messages": (
        [{**TRL, "prompt": TALK, "chosen": [turn("assistant", "Ada.")], "rejected": [turn("assistant", "Bob.")]}] * 3,
        DIMENSIONS, r"(prompt|chosen|rejected).*",
    ),
    "trl, whole conversations": (
        [{"chosen": [*TALK, {**turn("assistant", "Ada."), "tool_calls": [CALL]}],
          "rejected": [*TALK, turn("assistant", "Bob.")], **COLUMNS}] * 3,
        DIMENSIONS, r"chosen\.4.*|rejected\.[0-4].*|(chosen|rejected)",
    ),
    "trl, scores in a mapping": (
        [{"prompt": "Who?", "chosen": "Ada.", "rejected": "Bob.", "chosen_scores": {"helpfulness": 4},
          "rejected_scores": {"helpfulness": 1}}] * 3,
        ("no_object", "helpfulness"), r".*_scores\..*",
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Ada."},
          "rejected": {"from": "gpt", "value": "Bob."}, **COLUMNS}] * 3,
        DIMENSIONS, r"conversations.*|(chosen|rejected)(\.value)?|.*_(chosen|rejected)",
    ),
    "helpsteer2": (
        [{"prompt": f"Who? {i // 2}", "response": f"A {i}.", "helpfulness": i % 2, "correctness": 1} for i in range(6)],
        HELPSTEER, r"response|helpfulness|correctness",
    ),
    "helpsteer2_preference": (
        [{"prompt": "Who?", "response_1": "A.", "response_2": "B.", "preference_strength": 2}] * 3, ("no_object",),
        r".*",
    ),
    "ultrafeedback": (
        [{"instruction": "Who?", "completions": [rating("A.", 8.0, "4"), rating("B.", 2.0, "1")]}] * 3,
        ("no_object", "helpfulness", "truthfulness"), r"instruction|completions(\.[01](\.response|\.annotations.*)?)?",
    ),
}  # fmt: skip


def paths_of(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*path, key))


def damaged(record, path, damage):
    record = json.loads(json.dumps(record))
    *parents, last = path
    place = record
    for parent in parents:
        place = place[parent]
    if damage is DELETED:
        del place[last]
    else:
        place[last] = damage
    return record


def spelt(path):
    """chosen.4.content -> chosen[4].content"""
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path)))


def original(record, path):
    for key in path:
        record = record[key]
    return record


# May be left out, null, or empty: the record means the same without it.
OPTIONAL = re.compile(
    r"system|history|tools|chat_template_kwargs|.*\.(tool_calls|arguments|arguments\.a|type)"
    r"|(prompt|history).*content|history\.0\.1|chosen\.4\.content"
)
MEANT = ("preference_strength", 3)  # much better
EMPTY = (None, DELETED, "", " \n", [])


def arrives(value, pairs):
    """Whether a value that could be meant is in a pair as it is: nothing is lost in silence."""
    if isinstance(value, str):
        texts = [text for pair in pairs for text in (repr(pair), pair.chosen_fields, pair.rejected_fields)]
        return "\ud83d" not in value and any(value in text or json.dumps(value) in text for text in texts)
    return isinstance(value, (int, float, list, dict)) and any(json.dumps(value) in repr(pair) for pair in pairs)


def names_the_place(error, path, index):
    """The record, and the field, what it is in, or what is in it."""
    field = spelt(path)
    if error.record != index or not error.field:
        return False
    return error.field.startswith(field) or field.startswith(error.field)


def outcome(name, folder, path, index, kind):
    """What becomes of one damage: "named", or of one that leaves a good record "kept", "optional" or "counted"; else
    what is wrong."""
    records, dimensions, _ = GOOD[name]
    damage = DAMAGE[kind]
    content = [damaged(record, path, damage) if i == index else record for i, record in enumerate(records)]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in content))
    try:
        pairs, errors, dropped = read_records(Source.parse(file), Reading(dimensions))
    except DataError as error:
        return f"the whole file: {error}"
    if errors:
        named = len(errors) == 1 and names_the_place(errors[0], path, index)
        return "named" if named else f"{len(errors)} errors: {errors[0]}"
    if arrives(damage, pairs) or (path[-1], damage) == MEANT:
        return "kept"
    if damage in EMPTY and OPTIONAL.fullmatch(".".join(map(str, path))):
        return "optional"
    if dropped:
        return "counted"
    return f"unseen, {len(pairs)} pairs"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    found = {}
    for name, (records, _, pattern) in GOOD.items():
        for path in paths_of(records[1]):
            if not re.fullmatch(pattern, ".".join(map(str, path))):
                continue
            for kind in DAMAGE:
                if not (isinstance(path[-1], int) and DAMAGE[kind] is DELETED):  # a shorter conversation is another one
                    found[name, spelt(path), kind] = outcome(name, folder, path, 1, kind)
    return found


def test_the_files_are_good(tmp_path):
    for name, (records, dimensions, _) in GOOD.items():
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        pairs, errors, dropped = read_records(Source.parse(file), Reading(dimensions))
        assert errors == [] and dropped == {} and len(pairs) == 3, name


def test_every_damage_is_named_or_leaves_a_good_record(outcomes):
    wrong = {place: result for place, result in outcomes.items() if len(result) > 8}
    assert not wrong, "\n".join(f"{' | '.join(place)}: {result}" for place, result in wrong.items())


def test_the_page_has_the_numbers(outcomes):
    results = list(outcomes.values())
    bad = results.count("named")
    fine = len(results) - bad
    assert f"{len(results):,} damages" in PAGE.read_text() and f"{bad:,} make a record bad" in PAGE.read_text()
    assert f"{fine} leave a good record" in PAGE.read_text()
