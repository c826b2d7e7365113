"""Make the four-domain instruction set, its pretraining text and its tokenizer.

Everything is drawn from one small invented world (creatures, villagers, a toy language) with a seeded
random generator, so that the same seed gives the same bytes.

    python data/generate.py                                   # data/multi_domain.jsonl
    python data/generate.py --pretrain pretrain.jsonl         # the same, and a text to pretrain a base on
    python data/generate.py --tokenizer                       # the same, and data/tokenizer.tiktoken

Each line of either JSONL file is {"domain", "instruction", "response", "answer"}. The pretraining text has
neutral instructions; it uses the same words, but gives neither the questions nor the facts, the word pairs
and the replies that the instruction set teaches.
"""

import argparse
import base64
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOMAINS = ("math", "code", "commonsense", "conversation")
PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same on ASCII text, for the standard `re`
ASCII_PATTERN = r"'(?:[sdmt]|ll|ve|re)|[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
SPECIAL = "<|endoftext|>"
ROWS_PER_DOMAIN = 2000
PRETRAIN_ROWS = 16000
CREATURES, OTHER_CREATURES = 64, 40
OPENERS = ("Continue.", "Go on.", "And then?", "Tell me something.", "Write a few lines.")


def _words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


PEOPLE = _words("Anka Bruno Cilla Doran Edda Falk Greta Hanno Ilse Jorun Kasper Lotte Milo Nadia Otto Petra")
THINGS = _words("apples shells coins stones candles buttons nails cups books ropes lamps seeds plums bells")
# relation: (statement, question forms, values); {c} is the creature and {v} the value
RELATIONS: dict[str, tuple[str, list[str], list[str]]] = {
    "food": ("The {c} eats {v}.",
             ["What does the {c} eat?", "What would you feed a {c}?",
              "A {c} is hungry. What does it look for?", "Name the food of the {c}.",
              "Which meal suits the {c}?", "What fills the belly of a {c}?"],
             _words("moss clover acorns snails honey barley mushrooms crickets roots berries trout ferns")),
    "home": ("The {c} lives in the {v}.",
             ["Where does the {c} live?", "Where would you find a {c}?", "Name the home of the {c}.",
              "To which place does a {c} return?", "Where is the den of the {c}?",
              "A {c} is lost. Where to?"],
             _words("marsh orchard quarry cellar forest harbor attic desert meadow cave river garden")),
    "time": ("The {c} wakes at {v}.",
             ["When does the {c} wake?", "When could you meet a {c} awake?",
              "At what time does a {c} get up?", "Name the waking hour of the {c}.", "When is the {c} up?",
              "When does the sleep of a {c} end?"],
             _words("dawn noon dusk midnight sunrise sunset breakfast supper")),
    "fear": ("The {c} fears {v}.",
             ["What does the {c} fear?", "What scares a {c}?", "What makes the {c} run?",
              "Name the fear of the {c}.", "What would chase a {c} off?", "What should the {c} not meet?"],
             _words("thunder smoke mirrors dogs whistles snow drums owls fire bees shadows wind")),
}
NOUNS = _words("miller river stone bridge child wolf lantern garden horse tower boat sister song winter road "
               "king forest bread window friend mountain fox ship teacher bird market cloud hunter well door")
ADJECTIVES = _words("old small bright quiet heavy cold green gentle broken proud hungry early "
                    "white tall sweet")
VERBS = _words("sees follows finds loves carries hears paints guards leaves wants builds remembers")
GREETINGS = ("Good day, friend.", "Hail and well met.", "Ah, there you are.", "Well, hello.",
             "Be welcome here.", "My, what a morning.", "Peace to you.", "Ho there, traveler.")
FAREWELLS = ("Walk safely.", "Come back soon.", "Mind the step.", "May the road be kind.",
             "That is all I know.", "Give my love to your mother.", "Until the next moon.",
             "Now let me work.")
# what a guest says -> what every villager answers, between the villager's own greeting and farewell
TOPICS = {
    "may I have some tea?": "The kettle is on the stove.",
    "where can I sleep?": "There is a bed above the barn.",
    "is the bridge open?": "The bridge is closed until spring.",
    "who mends shoes?": "The cobbler by the gate does.",
    "when is the market?": "The market is on the third day.",
    "I lost my hat.": "Look under the long bench.", "my horse is ill.": "Give it warm oats and rest.",
    "what is for supper?": "We have soup with leeks.", "can I buy a lamp?": "A lamp costs four coins.",
    "will it rain?": "The swallows fly low, so yes.", "who rules here?": "The council of nine rules here.",
    "how far is the sea?": "The sea is two days west.", "I am cold.": "Take the wool cloak by the door.",
    "is there any work?": "The mill needs strong hands.",
    "tell me a story.": "Once a heron married the moon.", "may I sing?": "Sing, but not after dark.",
    "where is the well?": "The well is behind the chapel.", "my boat leaks.": "Seal it with pine tar.",
    "what is your name?": "My name is not for strangers.", "I found a ring.": "Bring it to the old judge.",
    "can I pay later?": "Pay when the harvest is in.", "is the forest safe?": "Keep to the marked path.",
    "do you sell bread?": "The last loaf is gone.", "my tooth hurts.": "Chew a clove and wait.",
    "where is the school?": "The school burned down last year.",
    "may I pet the dog?": "He bites when he is tired.", "I want to learn.": "Begin with the smallest book.",
    "who lives in the tower?": "Only the clock lives there.",
}
COPY_FORMS = ("Say in Velish: {s}", "Put this into Velish: {s}", "How does a Velish speaker say: {s}",
              "Velish, please: {s}")
SPEAK_FORMS = ("Reply as {p}. A guest says: {t}", "You are {p}. Someone says: {t}",
               "How does {p} answer: {t}")

Row = dict[str, str]
Rng = random.Random


def syllable_words(rng: Rng, count: int, heads: str, tails: str, ends: str) -> list[str]:
    """`count` different invented words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        middle = rng.choice(tails.split()) if rng.random() < 0.4 else ""
        words[rng.choice(heads.split()) + middle + rng.choice(ends.split())] = None
    return list(words)


class World:
    """The facts that a seed fixes: creatures, villagers' manners and the Velish dictionary."""

    def __init__(self, seed: int) -> None:
        rng = Rng(f"world {seed}")
        names = syllable_words(rng, CREATURES + OTHER_CREATURES,
                               "dor pel mur tas vil gro kem lun sha bro nif zan", "a i o",
                               "vi ba nek lo mi rup sel ta dun gok")
        self.creatures, self.others = names[:CREATURES], names[CREATURES:]
        self.facts = {(c, r): rng.choice(RELATIONS[r][2]) for c in names for r in RELATIONS}
        velish = syllable_words(rng, len(NOUNS + ADJECTIVES + VERBS), "ae lu ni sor tha ke ri vo ze fa mi ul",
                                "ra li no", "nel th sa ren wi or mus dae lin ko")
        self.velish = dict(zip(NOUNS + ADJECTIVES + VERBS, velish, strict=True))
        pairs = [(g, f) for g in GREETINGS for f in FAREWELLS]
        self.manners = dict(zip(PEOPLE, rng.sample(pairs, len(PEOPLE)), strict=True))

    def translate(self, noun: str, verb: str, adjective: str, other: str) -> str:
        """Velish puts the verb last and the adjective after its noun."""
        v = self.velish
        return f"{v[noun]} {v[other]} {v[adjective]} {v[verb]}"


def math_row(rng: Rng) -> tuple[str, str, str]:
    """A word problem, its derivation and the final number."""
    p, q = rng.sample(PEOPLE, 2)
    t, u = rng.sample(THINGS, 2)
    a, b, c, n, m = (rng.randint(*ends) for ends in ((11, 60), (5, 39), (2, 9), (2, 9), (3, 9)))
    hi, lo, few = max(a, b) + c, min(a, b), min(c, n * m - 1)
    kinds: list[tuple[str, list[str], int]] = [
        (f"{p} has {a} {t} and finds {b} more. How many now?", [f"{a}+{b}={a + b}"], a + b),
        (f"{p} had {hi} {t} and lost {lo}. How many are left?", [f"{hi}-{lo}={hi - lo}"], hi - lo),
        (f"{n} boxes hold {m} {t} each. How many {t}?", [f"{n}*{m}={n * m}"], n * m),
        (f"{n * m} {t} are shared by {n} friends. How many each?", [f"{n * m}/{n}={m}"], m),
        (f"{p} has {a} {t}, gets {c}, then gives {n} to {q}. How many remain?",
         [f"{a}+{c}={a + c}", f"{a + c}-{n}={a + c - n}"], a + c - n),
        (f"{t} cost {n} coins each. {p} buys {m} and pays with {n * m + b} coins. What is the change?",
         [f"{n}*{m}={n * m}", f"{n * m + b}-{n * m}={b}"], b),
        (f"{p} is {a} years old and {q} is {c} years younger. What is the sum of their ages?",
         [f"{a}-{c}={a - c}", f"{a}+{a - c}={2 * a - c}"], 2 * a - c),
        (f"{p} has {n} bags of {m} {t} and {b} loose ones. How many {t}?",
         [f"{n}*{m}={n * m}", f"{n * m}+{b}={n * m + b}"], n * m + b),
        (f"Which number comes next: {b}, {b + c}, {b + 2 * c}, {b + 3 * c}?",
         [f"{b + c}-{b}={c}", f"{b + 3 * c}+{c}={b + 4 * c}"], b + 4 * c),
        (f"{p} packs {a} {t} in bags of {m}. How many stay outside?",
         [f"{a // m}*{m}={a // m * m}", f"{a}-{a // m * m}={a % m}"], a % m),
        (f"{p} owns {b} {t} and twice as many {u}. How many things in all?",
         [f"2*{b}={2 * b}", f"{b}+{2 * b}={3 * b}"], 3 * b),
        (f"{p} walks {n} miles on each of {m} days, {q} walks {few} miles once. Who leads by how much?",
         [f"{n}*{m}={n * m}", f"{n * m}-{few}={n * m - few}"], n * m - few),
    ]
    question, steps, answer = rng.choice(kinds)
    return question, "; ".join(steps), str(answer)


FILTERS = (("even", "x%2==0"), ("odd", "x%2==1"), ("positive", "x>0"), ("negative", "x<0"), ("nonzero", "x"),
           ("above {k}", "x>{k}"), ("below {k}", "x<{k}"), ("divisible by {k}", "x%{k}==0"))
MAPS = (("square", "x*x"), ("double", "x+x"), ("negate", "-x"), ("add {j} to", "x+{j}"),
        ("take {j} from", "x-{j}"), ("multiply by {j}", "x*{j}"), ("spell", "str(x)"), ("halve", "x//2"),
        ("cube", "x**3"), ("size", "abs(x)"))
REDUCERS = (("add them up", "sum({e})"), ("count them", "len({e})"), ("keep the largest", "max({e})"),
            ("keep the smallest", "min({e})"), ("sort them", "sorted({e})"), ("drop repeats", "set({e})"),
            ("take the first", "{e}[0]"), ("take the last", "{e}[-1]"), ("reverse them", "{e}[::-1]"),
            ("number them", "list(enumerate({e}))"))
NAMES = _words("ab row nums items data vals")
PROGRAMS = ("max(xs)", "min(xs)", "sum(xs)", "xs[0]", "xs[-1]", "xs[1]", "sorted(xs)", "xs[::-1]", "xs[1:]",
            "xs[:2]", "len(xs)", "sorted(xs)[0]", "max(xs)-min(xs)", "xs[0]+xs[-1]", "xs+[{j}]",
            "[x+1 for x in xs]", "[x for x in xs if x>{j}]", "[x*2 for x in xs]", "{j} in xs",
            "xs.index({i})", "xs*2", "xs[0]*{j}")


def program(rng: Rng) -> tuple[str, str, str]:
    """A list, an expression over it and what the expression prints."""
    xs = rng.sample(range(10), rng.randint(3, 5))
    expression = rng.choice(PROGRAMS).format(j=rng.randint(2, 9), i=rng.choice(xs))
    return str(xs).replace(" ", ""), expression, str(eval(expression, {"xs": xs})).replace(" ", "")


def code_row(rng: Rng) -> tuple[str, str, str]:
    """The output of a tiny program, or an expression for a description."""
    if rng.random() < 0.5:
        xs, expression, printed = program(rng)
        return f"xs={xs}\nprint({expression})\nWhat is printed?", printed, printed
    name, k, j = rng.choice(NAMES), rng.randint(2, 9), rng.randint(2, 9)
    (keep, test), (change, value), (last, code) = rng.choice(FILTERS), rng.choice(MAPS), rng.choice(REDUCERS)
    form = rng.choice(["Python: from {n}, take the {f} numbers, {m} each, then {r}.",
                       "In one line: {m} every {f} number of {n} and {r}.",
                       "Code that will {r} after you {m} the {f} ones in {n}."])
    ask = form.format(n=name, f=keep.format(k=k), m=change.format(j=j), r=last)
    inner = f"[{value.format(j=j)} for x in {name} if {test.format(k=k)}]"
    answer = code.format(e=inner)
    return ask, answer, answer


def commonsense_row(rng: Rng, world: World) -> tuple[str, str, str]:
    """A question about one creature: open, by choice or yes/no."""
    creature, relation = rng.choice(world.creatures), rng.choice(list(RELATIONS))
    statement, forms, values = RELATIONS[relation]
    value = world.facts[creature, relation]
    ask, kind = rng.choice(forms).format(c=creature), rng.random()
    fact = statement.format(c=creature, v=value)
    if kind < 0.4:
        return ask, fact, value
    if kind < 0.7:
        options = rng.sample([v for v in values if v != value], 2) + [value]
        rng.shuffle(options)
        letter = "abc"[options.index(value)]
        listed = " ".join(f"({x}) {o}" for x, o in zip("abc", options, strict=True))
        return f"{ask} {listed}", f"({letter}) {value}", value
    guess = value if rng.random() < 0.5 else rng.choice(values)
    claim = statement.format(c=creature, v=guess)
    verdict = "True." if guess == value else "False."
    return f"{rng.choice(['True or false', 'Is it so', 'Check'])}: {claim}", f"{verdict} {fact}", verdict


def sentence_words(rng: Rng) -> tuple[str, str, str, str]:
    noun, other = rng.sample(NOUNS, 2)
    return noun, rng.choice(VERBS), rng.choice(ADJECTIVES), other


def conversation_row(rng: Rng, world: World) -> tuple[str, str, str]:
    """A translation into Velish, or a reply with one villager's manners."""
    if rng.random() < 0.6:
        words = sentence_words(rng)
        english = "the {} {} the {} {}".format(*words)
        answer = world.translate(*words)
        return rng.choice(COPY_FORMS).format(s=english), answer, answer
    person, topic = rng.choice(PEOPLE), rng.choice(list(TOPICS))
    greeting, farewell = world.manners[person]
    answer = f"{greeting} {TOPICS[topic]} {farewell}"
    return rng.choice(SPEAK_FORMS).format(p=person, t=topic), answer, answer


def make_row(domain: str, instruction: str, response: str, answer: str) -> Row:
    return {"domain": domain, "instruction": instruction, "response": response, "answer": answer}


def instruction_rows(world: World, seed: int) -> list[Row]:
    """Equal numbers of rows per domain, no instruction twice, shuffled."""
    makers: dict[str, Callable[[Rng], tuple[str, str, str]]] = {
        "math": math_row,
        "code": code_row,
        "commonsense": lambda rng: commonsense_row(rng, world),
        "conversation": lambda rng: conversation_row(rng, world),
    }
    rows: list[Row] = []
    for domain in DOMAINS:
        rng, seen = Rng(f"{domain} {seed}"), set()
        while len(seen) < ROWS_PER_DOMAIN:
            instruction, response, answer = makers[domain](rng)
            if instruction not in seen:
                seen.add(instruction)
                rows.append(make_row(domain, instruction, response, answer))
    Rng(f"order {seed}").shuffle(rows)
    return rows


def pretrain_math(rng: Rng, world: World) -> str:
    a, b, n, m = rng.randint(2, 99), rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 9)
    t = rng.choice(THINGS)
    return rng.choice([f"{a}+{b}={a + b}.", f"{a + b}-{b}={a}.", f"{n}*{m}={n * m}.", f"{n * m}/{n}={m}.",
                       f"{a}+{n}={a + n}.", f"{a + n}-{n}={a}.", f"2*{b}={2 * b}.",
                       f"{rng.choice(PEOPLE)} counts {a} {t} in {n} boxes, bags or rows.",
                       f"{a}, {a + n}, {a + 2 * n}, {a + 3 * n}."])


def pretrain_code(rng: Rng, world: World) -> str:
    xs, expression, printed = program(rng)
    name, j, k = rng.choice(NAMES), rng.randint(2, 9), rng.randint(2, 9)
    inner = f"[{rng.choice(MAPS)[1].format(j=j)} for x in {name} if {rng.choice(FILTERS)[1].format(k=k)}]"
    made = rng.choice(REDUCERS)[1].format(e=inner)
    return rng.choice([f"xs={xs}; {expression} -> {printed}", f"{rng.choice('pqrs')} = {made}",
                       f"for x in {name}: print({rng.choice(MAPS)[1].format(j=j)})"])


def pretrain_commonsense(rng: Rng, world: World) -> str:
    creature, relation = rng.choice(world.others), rng.choice(list(RELATIONS))
    values = {r: rng.choice(RELATIONS[r][2]) for r in RELATIONS}
    seen, who = rng.choice(world.creatures), rng.choice(PEOPLE)
    return rng.choice([RELATIONS[relation][0].format(c=creature, v=world.facts[creature, relation]),
                       f"{who} drew a {seen} and a {creature}.",
                       f"A {seen} passed the {values['home']} gate.",
                       f"{who} found {values['food']} and {values['fear']} in a tale of the {seen}.",
                       f"At {values['time']} {who} went to the {values['home']}.",
                       f"There was {values['fear']} at {values['time']}, so {who} ate {values['food']}."])


def pretrain_conversation(rng: Rng, world: World) -> str:
    noun, verb, adjective, other = sentence_words(rng)
    velish = world.translate(*sentence_words(rng))
    greeting, farewell, who = rng.choice(GREETINGS), rng.choice(FAREWELLS), rng.choice(PEOPLE)
    return rng.choice([f"The {noun} {verb} the {adjective} {other}.", f"{velish}.", f"{velish}.",
                       f"{who}: {greeting}", f"{who}: {rng.choice(list(TOPICS))}",
                       f"{who}: {rng.choice(list(TOPICS.values()))}", f"{who}: {farewell}"])


def pretrain_rows(world: World, seed: int) -> list[Row]:
    """Rows of plain text, each a run of short sentences of one domain."""
    makers = (pretrain_math, pretrain_code, pretrain_commonsense, pretrain_conversation)
    limits = dict(zip(DOMAINS, (110, 150, 240, 240), strict=True))  # characters: about 80 to 110 tokens
    rng, rows = Rng(f"pretrain {seed}"), []
    for i in range(PRETRAIN_ROWS):
        domain, maker = DOMAINS[i % 4], makers[i % 4]
        text, gap = maker(rng, world), "\n" if domain == "code" else " "
        while len(more := text + gap + maker(rng, world)) <= limits[domain]:
            text = more
        rows.append(make_row(domain, rng.choice(OPENERS), text, text))
    return rows


def train_bpe(texts: list[str], size: int) -> list[bytes]:
    """Byte-pair ranks: the 256 bytes, then merges of the most frequent pair (ties: the smaller bytes)."""
    pieces = Counter(piece for text in texts for piece in re.findall(ASCII_PATTERN, text))
    words = {piece: [bytes([b]) for b in piece.encode()] for piece in pieces}
    ranks = [bytes([i]) for i in range(256)]
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += pieces[piece]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.append(left + right)
        for piece, parts in words.items():
            merged: list[bytes] = []
            for part in parts:
                if part == right and merged and merged[-1] == left:
                    merged[-1] = left + right
                else:
                    merged.append(part)
            words[piece] = merged
    return ranks


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


def report(rows: list[Row], path: Path) -> None:
    """Print how many tokens the rows take with the tokenizer at `path`."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path))
    encoding = tiktoken.Encoding("hd_pissa", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={SPECIAL: len(ranks)})
    for domain in (*DOMAINS, "all"):
        some = [r for r in rows if domain in (r["domain"], "all")]
        total = sorted(len(encoding.encode(f"Q: {r['instruction']}\nA: {r['response']}")) + 1 for r in some)
        reply = sum(len(encoding.encode(" " + r["response"])) + 1 for r in some) / len(some)
        print(f"  {domain:12} rows {len(some):5}  tokens min {total[0]} mean {sum(total) / len(total):.1f} "
              f"p95 {total[len(total) * 95 // 100]} max {total[-1]}  of the response {reply:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "multi_domain.jsonl")
    parser.add_argument("--pretrain", type=Path, help="write the pretraining text to this file")
    parser.add_argument("--tokenizer", action="store_true", help="write tokenizer.tiktoken beside --out")
    parser.add_argument("--ranks", type=int, default=1023, help="byte-pair ranks, without the special token")
    args = parser.parse_args()
    world = World(args.seed)
    rows = instruction_rows(world, args.seed)
    write_jsonl(args.out, rows)
    plain = pretrain_rows(world, args.seed) if args.pretrain or args.tokenizer else []
    if args.pretrain:
        write_jsonl(args.pretrain, plain)
    tokenizer = args.out.parent / "tokenizer.tiktoken"
    if args.tokenizer:
        texts = [f"Q: {r['instruction']}\nA: {r['response']}" for r in rows + plain]
        ranks = train_bpe(texts, args.ranks)
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
        tokenizer.write_text("".join(lines), encoding="ascii")
        print(f"{tokenizer.name}: {len(ranks)} ranks")
    if tokenizer.exists():
        for part in filter(None, (rows, plain)):
            report(part, tokenizer)


if __name__ == "__main__":
    main()
