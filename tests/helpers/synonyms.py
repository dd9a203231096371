"""A table of words for tests: terms of several words, irregular plurals, terms within terms."""

TABLE = {
    "dog": ("puppy",),
    "hot dog": (),
    "bird": ("baby bird", "duck"),
    "person": ("man", "baby", "child"),
    "wine glass": ("glass",),
    "toilet": ("toilet seat",),
    "chair": ("seat",),
    "knife": (),
    "bus": (),
    "sheep": (),
}
