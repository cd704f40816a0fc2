"""The words chronicles are made of: names, offices, things, and the sentences and questions of each relation.

`examples/chronicles.py` tells chronicles with them. Names are joined from two syllables, and one name in five is
held out: it is in no chronicle of the split `train`. Each relation holds out its last templates likewise.
"""

from dataclasses import dataclass
from itertools import product

_ONSETS = [
    "Al",
    "Bran",
    "Cor",
    "Del",
    "Ed",
    "Fen",
    "Gret",
    "Hol",
    "Is",
    "Jor",
    "Kes",
    "Lin",
    "Mar",
    "Nor",
    "Or",
    "Per",
    "Quil",
    "Row",
    "Sab",
    "Tam",
    "Ul",
    "Ves",
    "Wys",
    "Yar",
    "Bal",
    "Cas",
    "Dun",
    "Eld",
    "Gar",
    "Had",
    "Ivo",
    "Lor",
    "Mil",
    "Ran",
    "Sig",
    "Tor",
    "Ans",
    "Bes",
    "Cyn",
    "Dag",
    "Em",
    "Flo",
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
    "Lud",
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
    "Rain fell for nine days.",
)


@dataclass(frozen=True)
class Relation:
    """What can be told of a person, and how it is told and asked. The value comes last in the first sentences.

    `hidden` asks for the value without a content word that any of the sentences has; {who} is a description of the
    person by another relation's `described`.
    """

    values: tuple[str, ...] | None  # none: drawn from the split's own names (ports, people)
    sentences: tuple[str, ...]  # {p} person, {v} value; the last one is held out
    direct: tuple[str, ...]  # asks for {v} by {p}; the last one is held out
    inverse: tuple[str, ...]  # asks for {p} by {v}; empty where values repeat
    hidden: tuple[str, ...]  # asks for {v} by {who}; the last one is held out
    described: str  # {who}, by {v}; empty where values repeat


RELATIONS = {
    "voyage": Relation(
        None,
        (
            "{p} sailed to {v}.",
            "{p} took ship for {v}.",
            "In spring {p} set sail for {v}.",
            "Fair winds bore {p} to {v}.",
        ),
        ("Where did {p} sail to?", "Which port did {p} sail to?", "To what port did {p} take ship?"),
        (),
        ("What haven did {who} reach?", "Which haven saw {who} arrive?", "At what haven did {who} go ashore?"),
        "",
    ),
    "office": Relation(
        OFFICES,
        ("{p} became {v}.", "{p} was made {v}.", "By vote {p} was chosen {v}.", "The bishop named {p} {v}."),
        ("What did {p} become?", "What was {p} made?", "What was {p} chosen to be?"),
        ("Who became {v}?", "Who was made {v}?", "Who was chosen {v}?"),
        ("Which post did {who} hold?", "What duty fell to {who}?", "What post was given to {who}?"),
        "the {v}",
    ),
    "gift": Relation(
        GIFTS,
        (
            "{p} gave the church {v}.",
            "{p} left the church {v}.",
            "At Easter {p} gave the church {v}.",
            "From {p} the church had {v}.",
        ),
        ("What did {p} give the church?", "What did {p} leave the church?", "What had the church from {p}?"),
        ("Who gave the church {v}?", "Who left the church {v}?", "From whom had the church {v}?"),
        ("What did {who} offer at the altar?", "What offering came from {who}?", "Which offering did {who} bring?"),
        "the giver of {v}",
    ),
    "home": Relation(
        STREETS,
        ("{p} lived in {v}.", "{p} took a house in {v}.", "All year {p} lived in {v}.", "They knew {p} of {v}."),
        ("Where did {p} live?", "Where did {p} take a house?", "In which street was {p} known?"),
        (),
        ("What was the address of {who}?", "Where was the door of {who}?", "At what address was {who} met?"),
        "",
    ),
    "find": Relation(
        FINDS,
        ("{p} found {v}.", "{p} dug up {v}.", "In the sand {p} found {v}.", "The sea cast before {p} {v}."),
        ("What did {p} find?", "What did {p} dig up?", "What did the sea cast before {p}?"),
        ("Who found {v}?", "Who dug up {v}?", "Before whom did the sea cast {v}?"),
        ("Which treasure fell to {who}?", "What treasure did {who} own?", "What was the treasure of {who}?"),
        "the finder of {v}",
    ),
    "work": Relation(
        WORKS,
        ("{p} built {v}.", "{p} paid for {v}.", "After the flood {p} built {v}.", "At the cost of {p} rose {v}."),
        ("What did {p} build?", "What did {p} pay for?", "What rose at the cost of {p}?"),
        ("Who built {v}?", "Who paid for {v}?", "At whose cost rose {v}?"),
        (
            "What does the town owe to {who}?",
            "Which labour does the town owe to {who}?",
            "What labour was begun by {who}?",
        ),
        "the builder of {v}",
    ),
    "trade": Relation(
        GOODS,
        (
            "{p} traded in {v}.",
            "{p} dealt in {v}.",
            "For years {p} traded in {v}.",
            "The purse of {p} was filled by {v}.",
        ),
        ("What did {p} trade in?", "What did {p} deal in?", "What filled the purse of {p}?"),
        (),
        ("Which wares did {who} sell?", "What wares made {who} rich?", "What wares were sold by {who}?"),
        "",
    ),
    "fear": Relation(
        BEASTS,
        (
            "{p} feared {v}.",
            "{p} ran from {v}.",
            "Since childhood {p} feared {v}.",
            "Nothing drove {p} indoors but {v}.",
        ),
        ("What did {p} fear?", "What did {p} run from?", "What drove {p} indoors?"),
        (),
        (
            "Which animal frightened {who}?",
            "What animal gave {who} bad dreams?",
            "Which animal was the terror of {who}?",
        ),
        "",
    ),
    "birth": Relation(
        YEARS,
        (
            "{p} was born in {v}.",
            "{p} came into the world in {v}.",
            "The mother of {p} bore twins in {v}.",
            "They christened {p} in {v}.",
        ),
        ("When was {p} born?", "When did {p} come into the world?", "When was {p} christened?"),
        (),
        (
            "How far back does the life of {who} go?",
            "With what date does the life of {who} begin?",
            "What is the first date of {who}?",
        ),
        "",
    ),
    "marriage": Relation(
        None,
        (
            "{p} married {v}.",
            "{p} took the hand of {v}.",
            "In secret {p} married {v}.",
            "The priest joined {p} with {v}.",
        ),
        ("Whom did {p} marry?", "Whose hand did {p} take?", "With whom was {p} joined?"),
        (),
        (
            "Who was the spouse of {who}?",
            "What was the name of the spouse of {who}?",
            "Who shared bed and table with {who}?",
        ),
        "",
    ),
}
