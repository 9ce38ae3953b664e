"""Records of every format with one field damaged, and lists of prompts."""

import gzip
import json

from bad_input import Bad
from good_files import RECORDS
from numbers_as_input import STEER

DELETED, HALF = object(), "So \ud83d"
TEXT = {"missing": DELETED, "null": None, "a number": 3, "true": True, "empty": "", "blank": " \n",
    "a mapping": {"a": 1},
        "half a character": HALF}  # fmt: skip
SCORE = {"missing": DELETED, "null": None, "text": "high", "true": True, "a list": [3], "NaN": float("nan"),
         "infinite": float("inf"), "negative": -1, "too high": 9, "huge": 1e308}  # fmt: skip
OBJECT = {"missing": DELETED, "null": None, "a number": 3, "a list": [3], "empty": {}}
LIST = {"missing": DELETED, "null": None, "a number": 3, "empty": [], "of numbers": [1, 2]}
TURN = [{"role": "user", "content": "Who?"}]
TRL = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Bob.", "helpfulness_chosen": 4, "helpfulness_rejected": 2}
TALK = {**TRL, "prompt": TURN, "chosen": [{"role": "assistant", "content": "Ada."}],
        "rejected": [{"role": "assistant", "content": "Bob."}]}  # fmt: skip
ULTRA = {
    "instruction": "Who?",
    "completions": [{"response": text, "overall_score": score, "annotations": {"helpfulness": {"Rating": str(stars)}}}
                    for text, score, stars in (("Ada.", 8.0, 4), ("Bob.", 2.0, 1))],
}  # fmt: skip
SHAREGPT = {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Ada."},
            "rejected": {"from": "gpt", "value": "Bob."}, "helpfulness_chosen": 4,
            "helpfulness_rejected": 1}  # fmt: skip
CONTENT = {name: value for name, value in TEXT.items() if name != "blank"}
# format: (a good record, its fields with what is none of their kind)
FORMATS = {
    "amopo": (RECORDS[0], {
        "prompt": TEXT, "chosen": OBJECT, "rejected": OBJECT, "chosen.response": TEXT, "rejected.response": TEXT,
        "chosen.helpfulness": SCORE, "rejected.helpfulness": SCORE}),
    "trl": (TRL, {"prompt": {k: v for k, v in TEXT.items() if k not in ("missing", "null")}, "chosen": TEXT,
                  "rejected": TEXT, "helpfulness_chosen": SCORE, "helpfulness_rejected": SCORE}),
    "messages": (TALK, {"prompt.0.role": {**TEXT, "unknown": "robot"}, "prompt.0.content": CONTENT,
                        "chosen": {k: v for k, v in LIST.items()}, "rejected.0.role": {**TEXT, "of the user": "user"},
                        "rejected.0.content": TEXT}),
    "ultrafeedback": (ULTRA, {"instruction": TEXT, "completions": {k: v for k, v in LIST.items() if k != "empty"},
    "completions.0.response": TEXT}),
    "sharegpt": (SHAREGPT, {"conversations": LIST, "chosen.value": TEXT, "rejected.value": TEXT,
                            "helpfulness_chosen": SCORE}),
}  # fmt: skip


def damaged(record, path, value):
    record = json.loads(json.dumps(record))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = record
    for key in parents:
        place = place[key]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return record


def of_formats():
    for name, (good, fields) in FORMATS.items():
        for path, kinds in fields.items():
            for kind, value in kinds.items():
                text = "".join(json.dumps(each) + "\n" for each in (good, damaged(good, path, value), good))

                def damage(work, here, text=text):
                    (here / "pairs.jsonl").write_text(text)

                spelt = path.split(".")[0]
                yield Bad(f"{name}: {path} {kind}",
                          ("validate", "{here}/pairs.jsonl", "--dimensions", "no_object", "helpfulness"),
                          (r"pairs\.jsonl, record 1, line 2", spelt, "Remedy: "), 1, damage)  # fmt: skip


LONG = 65 << 20
PROMPTS = {
    "no records": "",
    "a list in lines": '[{"prompt": "a"}]\n',
    "not JSON": '{"prompt": \n',
    "no prompt": '{"text": "a"}\n',
    "a number": '{"prompt": 3}\n',
    "empty": '{"prompt": ""}\n',
    "null": '{"prompt": null}\n',
    "no messages": '{"messages": []}\n',
    "an unknown role": '{"messages": [{"role": "robot", "content": "a"}]}\n',
    "the assistant's turn last": '{"messages": [{"role": "assistant", "content": "a"}]}\n',
    "messages without content": '{"messages": [{"role": "user"}]}\n',
    "a number for a record": "3\n",
    "half a character": '{"prompt": "\\ud83d"}\n',
}
BIG = {
    "a record over 64 MB": ("pairs.jsonl", lambda: b'{"prompt": "' + LONG * b"a" + b'"}\n', "64 M"),
    "a list over 64 MB": ("pairs.json", lambda: b'[{"prompt": "' + LONG * b"a" + b'"}]', "64 M"),
    "a gzip bomb": ("pairs.jsonl.gz", lambda: gzip.compress(b'{"prompt": "' + LONG * b"a" + b'"}\n', 1), "64 M"),
    "nesting": ("pairs.jsonl", lambda: 10**5 * b'{"a":', "nested too deep"),
    "a number of 5000 digits": ("pairs.jsonl", lambda: b'{"prompt": ' + 5000 * b"9" + b"}", "line 1"),
}


def of_files():
    for name, (file, content, word) in BIG.items():
        def damage(work, here, file=file, content=content):
            (here / file).write_bytes(content())

        yield Bad(f"validate: {name}", ("validate", f"{{here}}/{file}"), (file.replace(".", r"\."), word, "Remedy: "),
                  1, damage)  # fmt: skip
    for name, text in PROMPTS.items():
        def prompts(work, here, text=text):
            (here / "prompts.jsonl").write_text(text)

        for argv in (("generate", "{work}/trained", "--data", "{here}/prompts.jsonl"),
                     (*STEER, "--prompts", "{here}/prompts.jsonl")):  # fmt: skip
            yield Bad(f"{argv[0]}: prompts, {name}", argv, (r"prompts\.jsonl", "Remedy: "), 1, prompts)


RECORDS_GIVEN = [*of_formats(), *of_files()]
