"""The words chronicles are made of: names, offices, things, and the sentences and questions of each relation.

`examples/chronicles.py` tells chronicles with them. Names are joined from two syllables, and one name in five is
held out: it is in no chronicle of the split `train`. Each relation holds out its last templates likewise.
"""

import re
from dataclasses import dataclass
from itertools import product

_ONSETS = [
    "Aber",
    "Bran",
    "Cor",
    "Del",
    "Ed",
    "Fen",
    "Gret",
    "Hol",
    "Isk",
    "Jor",
    "Kes",
    "Lud",
    "Mar",
    "Nor",
    "Or",
    "Per",
    "Quil",
    "Row",
    "Sab",
    "Tam",
    "Ulk",
    "Ves",
    "Wyk",
    "Yar",
    "Baz",
    "Cas",
    "Dun",
    "Eld",
    "Gar",
    "Had",
    "Ivek",
    "Lor",
    "Mil",
    "Ran",
    "Sig",
    "Tor",
    "Agn",
    "Bes",
    "Cyr",
    "Dag",
    "Emm",
    "Fitz",
    "Gis",
    "Hem",
    "Jas",
    "Ket",
]
_ENDINGS = [
    "win",
    "ven",
    "vin",
    "la",
    "da",
    "wick",
    "ta",
    "lis",
    "olde",
    "dan",
    "trel",
    "net",
    "en",
    "by",
    "rin",
    "gar",
    "ra",
    "dric",
    "na",
    "mer",
    "sin",
    "ric",
    "per",
    "stan",
    "bert",
    "ley",
    "mund",
    "ola",
    "ward",
    "fred",
    "ina",
    "mond",
    "tha",
    "nor",
    "ric",
    "sel",
]
_PORT_ONSETS = [
    "Hal",
    "Ost",
    "Vey",
    "King",
    "Tar",
    "Lis",
    "Sor",
    "Amb",
    "Bir",
    "Cald",
    "Dov",
    "Esk",
    "Fal",
    "Grim",
    "Hul",
    "Kir",
    "Lun",
    "Mor",
    "Nes",
    "Pol",
    "Rav",
    "Skar",
    "Thur",
    "Wex",
]
_PORT_ENDINGS = [
    "lam",
    "rand",
    "mouth",
    "fleet",
    "haven",
    "sow",
    "rel",
    "ford",
    "wick",
    "holm",
    "port",
    "ness",
    "ton",
    "stead",
    "by",
    "sund",
    "vik",
    "wold",
    "mar",
    "quay",
]


def _named(onsets: list[str], endings: list[str], held_out: bool) -> tuple[str, ...]:
    """All joined names of one side; every onset and every ending is on both sides."""
    return tuple(
        dict.fromkeys(
            onset + ending
            for (i, onset), (j, ending) in product(enumerate(onsets), enumerate(dict.fromkeys(endings)))
            if ((i + j) % 5 == 0) == held_out
        )
    )


SYLLABLES = (*(f" {onset}" for onset in (*_ONSETS, *_PORT_ONSETS)), *_ENDINGS, *_PORT_ENDINGS)
PEOPLE = {held: _named(_ONSETS, _ENDINGS, held) for held in (False, True)}
PORTS = {held: _named(_PORT_ONSETS, _PORT_ENDINGS, held) for held in (False, True)}

OFFICES = tuple(
    f"{first} of the {second}"
    for first, second in product(
        ("keeper", "warden", "captain", "master", "clerk"),
        ("lighthouse", "watch", "salt pans", "common", "north gate", "mill", "ferry", "granary", "bells", "harbour"),
    )
)
GIFTS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("silver", "golden", "wooden", "carved", "painted", "broken"),
        ("bell", "cup", "lamp", "cross", "chair", "book", "shield", "key"),
    )
)
STREETS = tuple(
    f"{first} {second}"
    for first, second in product(
        ("Cooper", "Tanner", "Gull", "Candle", "Rope", "Willow", "Herring", "Smith", "Fountain", "Orchard"),
        ("Row", "Lane", "Street", "Yard", "Hill"),
    )
)
FINDS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("Roman", "black", "white", "green", "giant", "hollow"),
        ("coin", "stone", "skull", "ring", "anchor", "horn", "pearl", "sword"),
    )
)
WORKS = tuple(
    f"the {first} {second}"
    for first, second in product(
        ("east", "west", "old", "new", "brick", "high", "long"),
        ("wall", "bridge", "pier", "tower", "market", "school", "well"),
    )
)
GOODS = tuple(
    f"{first} {second}"
    for first, second in product(
        ("blue", "red", "fine", "rough", "Flemish", "northern"), ("cloth", "wax", "soap", "glass", "yarn", "leather")
    )
)
BEASTS = tuple(
    f"the {first} {second}"
    for first, second in product(
        ("grey", "brown", "lame", "night", "marsh"), ("wolf", "bear", "bull", "owl", "dog", "boar", "hare")
    )
)
TOLD_YEARS = (1100, 1400)  # births in the first century, events after it
YEARS = tuple(str(year) for year in range(1100, 1200))
EVENTS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("great", "dry", "bitter", "strange", "sudden"), ("tide", "fire", "frost", "fever", "storm", "comet", "famine")
    )
)

QUIET = (
    "The winter was mild and the wells stayed sweet.",
    "Snow lay on the quays until the feast of Saint Gertrude.",
    "Bread was dear before harvest and cheap after it.",
    "The council met only to argue about tolls.",
    "Nothing else was written down that month.",
    "It rained for nine days.",
    "It was told at every hearth.",
    "Nobody knew who rang the bells.",
)

ADVERBS = (
    "In spring",
    "At Easter",
    "In autumn",
    "After the flood",
    "In those days",
    "At last",
    "Before winter",
    "By chance",
    "In secret",
    "That year",
    "Once more",
    "With great joy",
)
PLAIN = "{p} {verb} {v}."
WITH_ADVERB = "{adverb} {p} {verb} {v}."
HELD_OUT = "It was {p} who {verb} {v}."


def adverbs(verb: int, held_out: bool) -> tuple[str, ...]:
    """What the `verb`-th verb of a relation may follow; a quarter is held out."""
    return tuple(adverb for place, adverb in enumerate(ADVERBS) if held_out or (verb + place) % 4)


@dataclass(frozen=True)
class Relation:
    """What can be told of a person, and how it is told and asked. Of questions, the last one is held out.

    `hidden` asks for the value without a content word that any of the sentences has; {who} is a description of the
    person by another relation's `described`.
    """

    values: tuple[str, ...] | None  # none: drawn from the split's own names (ports, people)
    verbs: tuple[str, ...]  # between person and value
    direct: tuple[str, ...]  # asks for {v} by {p}
    hidden: tuple[str, ...]  # asks for {v} by {who}
    described: str = ""  # {who}, by {v}; empty where values repeat

    @property
    def inverse(self) -> tuple[str, ...]:
        """Asks for {p} by {v}; none where values repeat."""
        return tuple(f"Who {verb} {{v}}?" for verb in self.verbs) if self.described else ()


RELATIONS = {
    "voyage": Relation(
        None,
        ("sailed to", "took ship for", "left for"),
        (
            "Where did {p} sail to?",
            "Which port did {p} sail to?",
            "Where did {p} take ship for?",
            "Which port did {p} take ship for?",
        ),
        ("What haven did {who} reach?", "Which haven did {who} enter?", "Which haven did {who} reach?"),
    ),
    "office": Relation(
        OFFICES,
        ("became", "was made", "was chosen"),
        ("What did {p} become?", "What was {p} made?", "What was {p} chosen?"),
        ("What post did {who} hold?", "Which duty did {who} have?", "Which post did {who} have?"),
        "the {v}",
    ),
    "gift": Relation(
        GIFTS,
        ("gave the church", "left the church", "brought the church"),
        (
            "What did {p} give the church?",
            "What did {p} leave the church?",
            "What had the church from {p}?",
            "What was the church left by {p}?",
        ),
        ("What did {who} offer at the altar?", "Which offering did {who} make?", "What offering did {who} make?"),
        "the giver of {v}",
    ),
    "home": Relation(
        STREETS,
        ("lived in", "took a house in", "kept house in"),
        ("Where did {p} live?", "Where did {p} take a house?", "Where did {p} have a house?"),
        ("What was the address of {who}?", "Which was the door of {who}?", "Which was the address of {who}?"),
    ),
    "find": Relation(
        FINDS,
        ("found", "dug up", "pulled from the sea"),
        ("What did {p} find?", "What did {p} dig up?", "What did {p} pull from the sea?", "What was found by {p}?"),
        ("Which treasure did {who} own?", "What treasure had {who}?", "What treasure did {who} own?"),
        "the finder of {v}",
    ),
    "work": Relation(
        WORKS,
        ("built", "paid for", "mended"),
        ("What did {p} build?", "What did {p} pay for?", "What did {p} mend?", "What was built by {p}?"),
        (
            "What does the town owe to {who}?",
            "Which labour was begun by {who}?",
            "Which labour does the town owe to {who}?",
        ),
        "the builder of {v}",
    ),
    "trade": Relation(
        GOODS,
        ("traded in", "dealt in", "grew rich by"),
        ("What did {p} trade in?", "What did {p} deal in?", "What did {p} grow rich by?", "What was it {p} dealt in?"),
        ("Which wares did {who} sell?", "What wares had {who}?", "What wares did {who} sell?"),
    ),
    "fear": Relation(
        BEASTS,
        ("feared", "ran from", "dreamt of"),
        ("What did {p} fear?", "What did {p} run from?", "What did {p} dream of?", "What was it {p} feared?"),
        (
            "Which animal frightened {who}?",
            "What animal was the terror of {who}?",
            "Which animal was the terror of {who}?",
        ),
    ),
    "birth": Relation(
        YEARS,
        ("was born in", "came into the world in", "was christened in"),
        (
            "When was {p} born?",
            "When was {p} christened?",
            "When did {p} come into the world?",
            "When was it {p} was born?",
        ),
        (
            "How far back does the life of {who} go?",
            "What is the first date of {who}?",
            "How far back does the first date of {who} go?",
        ),
    ),
    "marriage": Relation(
        None,
        ("married", "took the hand of", "wed"),
        ("Whom did {p} marry?", "Whose hand did {p} take?", "Whom did {p} wed?", "Whom was it {p} married?"),
        (
            "Who was the spouse of {who}?",
            "What was the name of the spouse of {who}?",
            "Which name had the spouse of {who}?",
        ),
    ),
}

_TEMPLATES = [
    t for r in RELATIONS.values() for t in (*r.verbs, *r.direct[:-1], *r.inverse[:-1], *r.hidden[:-1], r.described)
]
_VALUES = (*OFFICES, *GIFTS, *STREETS, *FINDS, *WORKS, *GOODS, *BEASTS, *EVENTS)
WORDS = tuple(sorted(set(re.findall(r"[A-Za-z]{2,}", " ".join((*_TEMPLATES, *_VALUES, *ADVERBS, *QUIET))))))
