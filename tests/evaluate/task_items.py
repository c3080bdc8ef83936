"""A few items of each of the harness's tasks, in the tasks' own columns, invented for the tests."""

import json

QUESTIONS = [
    ("What floats on the sea?", ["a ship", "a stone", "an anchor", "a nail"], 0),
    ("What gives light in the harbour at night?", ["the rope", "a lamp", "fog", "the sand"], 1),
    ("Who commands the ship?", ["nobody", "the gull", "the captain", "a lamp"], 2),
    ("What hides the lamp?", ["the rope", "the sail", "a song", "fog"], 3),
]
PASSAGE = "The captain said slowly that the lamp of the harbour was never seen under the fog. " * 2
ITEMS = {
    "arc_easy": [
        {"id": str(n), "question": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[a]}
        for n, (q, c, a) in enumerate(QUESTIONS)
    ],
    "boolq": [
        {"idx": n, "question": q, "passage": PASSAGE, "label": n % 2}
        for n, q in enumerate(["was the lamp seen", "did the captain speak", "is fog a ship"])
    ],
    "copa": [
        {"premise": p, "choice1": a, "choice2": b, "question": kind, "idx": n, "label": n % 2}
        for n, (p, a, b, kind) in enumerate(
            [
                ("The fog came.", "The lamp was lit.", "The sea was dry.", "effect"),
                ("The rope tore.", "It was new.", "The ship was heavy.", "cause"),
                ("The captain laughed.", "He was told a joke.", "He saw the storm.", "cause"),
            ]
        )
    ],
    "piqa": [
        {"goal": "to tie a ship", "sol1": "use a rope of the right length", "sol2": "use fog", "label": 0},
        {"goal": "to see in the fog", "sol1": "close your eyes", "sol2": "light the lamp", "label": 1},
        {"goal": "to stop", "sol1": "drop the anchor", "sol2": "drop the captain", "label": 0},
    ],
    "sciq": [
        {"question": q, "distractor3": c[1], "distractor1": c[2], "distractor2": c[3], "correct_answer": c[0]}
        | {"support": PASSAGE if n % 2 else ""}
        for n, (q, c, _) in enumerate(QUESTIONS)
    ],
    "rte": [
        {"sentence1": PASSAGE, "sentence2": "The lamp was seen.", "label": 1, "idx": 0},
        {"sentence1": PASSAGE, "sentence2": "The captain spoke.", "label": 0, "idx": 1},
    ],
    "hellaswag": [
        {"ind": n, "activity_label": "Sailing", "ctx_a": f"[header] {q}", "ctx_b": "the captain", "ctx": q}
        | {"endings": [f"says {word}. [title] Then  he goes" for word in c], "label": str(a), "split": "val"}
        for n, (q, c, a) in enumerate(QUESTIONS)
    ],
    "wikitext": [
        {"page": " = The Ship = \n \n The ship @-@ wright said : \" never \" . It was 1 @,@ 200 feet long . \n" * 2},
        {"page": " = Fog = \n \n Fog ( of the sea ) is slow ; it is said to sleep . \n"},
    ],
    "lambada_openai": [
        {"text": "Under the fog there was a ship, and on the ship, with a lamp, stood the captain"},
        {"text": "He took the rope, and slowly, very slowly, he pulled at the rope"},
        {"text": "never say never"},
    ],
}  # fmt: skip
SPLITS = {"wikitext": "test", "lambada_openai": "test"}


def write_items(folder, tasks=tuple(ITEMS)):
    """FOLDER/TASK/SPLIT.jsonl of each task; returns the folder."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        lines = "".join(json.dumps(item) + "\n" for item in ITEMS[task])
        (folder / task / f"{SPLITS.get(task, 'validation')}.jsonl").write_text(lines)
    return folder
