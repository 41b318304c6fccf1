"""What a prompt asks, in as few words as that takes: two prompts with the same gist ask for the same. Pure.

Why: vectors of "Does Alice owe Bob?" and "Does Bob owe Alice?" are closer to each other than those of most
paraphrases (docs/CACHE.md has the table). So the cache believes a vector only where the gist is the same too. All that
can change an answer stays in it, in its order: names, numbers, units, negations, tenses, prepositions, whatever is not
known here. Only English forms are known; of other languages equal words remain.
"""

from __future__ import annotations

import re
import unicodedata

MOST_CHARACTERS = 500  # as many tokens at most, for the smallest embedding models read no more

# With any of these it is code, or laid out: every character may matter.
_CODE = re.compile(r"[\n\r\t`{}()\[\]\\<>|~_^]")
_ENDS = " .!?…"
_INNER = r"[^\s.,;:!?'\"“”¿¡…-]+"
_TOKEN = re.compile(rf"(?:(?<!\S)\.)?{_INNER}(?:[.,:'/-](?=\w){_INNER})*|[-.,;:!?…]")
_WORD_AS_NAME = frozenset("US IT OR AM WHO AS IN ON ALL NO IS BE DO HE WE ME MAY WILL AN AT BY IF SO TO UP".split())
_IS = frozenset("what who where when how that there here it he she which why".split())  # with 's: is

_CONTRACTED = {
    "can't": "can not",
    "cannot": "can not",
    "won't": "will not",
    "shan't": "shall not",
    "i'm": "i am",
    "i'd": "i would",
    "i've": "i have",
    "i'll": "i will",
    "let's": "let us",
    "whats": "what is",
    "does": "do",
}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
} | {"first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th"}

# Words that are one and the same to whoever answers.
_SAME = {
    word: same
    for same, words in {
        "large": "big",
        "begin": "start commence",
        "fix": "repair",
        "buy": "purchase",
        "movie": "film",
        "photo": "picture image photograph",
        "write": "compose",
        "create": "make generate",
        "summarize": "summarise",
        "organize": "organise",
        "optimize": "optimise",
        "tire": "tyre",
        "color": "colour",
        "meter": "metre",
        "kilometer": "kilometre",
        "center": "centre",
        "program": "programme",
        "quick": "fast",
        "car": "automobile",
        "doctor": "physician",
        "phone": "telephone",
        "tv": "television",
        "wrote": "authored",
        "invent": "devise",
        "assist": "help",
        "show": "display",
        "delete": "remove",
        "percent": "%",
    }.items()
    for word in words.split()
}

# From the beginning of a prompt to its point, and behind it; taken away for as long as one is found.
_BEFORE = tuple(
    re.compile(rf"(?:{pattern})(?: ,)? (?=.)")
    for pattern in (
        r"please|kindly|hey|hi|hello|ok|okay|so|well|now",
        r"(?:can|could|would|will) you(?= (?!be |have |do ))",
        r"i (?:want|would like|need|wish)(?: you)? to(?= (?:know|understand|learn))",
        r"i (?:want|would like|need) you to",
        r"i (?:wonder|am wondering|am curious|was wondering)",
        r"do you know(?= (?:what|who|where|when|why|how|which))",
        r"(?:tell|show|explain to|teach) (?:me|us)(?= (?:what|who|where|when|why|how|which|the|a|an) )",
        r"(?:explain|describe|know|understand|learn)(?= (?:what|who|where|when|why|how|which) )",
    )
)
_BEHIND = (
    re.compile(r"(?<=.)(?: [,.])? (?:please|thanks|thank you)$"),
    re.compile(r"^((?:explain|describe|write|show|give|summarize|define|list) .+) (?:for|to) (?:me|us)$"),
)

# "How do you make bread?" is not about who is asked; "How do you feel?" is.
_DONE_BY_ANYBODY = "|".join(
    "create write cook bake boil fry roast build install open close sort reverse convert calculate compute find get "
    "say spell pronounce use fix change set reset add remove replace print read parse draw clean grow plant solve "
    "prove define declare test debug compile deploy configure split join merge sum count delete copy move".split()
)

# What is the same said in other ways, applied in this order. `\1` and `\2` are what it is about.
_SAID = tuple(
    (re.compile(rf"(?:^|(?<= )){pattern}(?=$| )"), same)
    for pattern, same in (
        # instructions
        (
            r"^(?:what is )?(?:the |an? )?(?:(?:best|easiest|right|correct|good) )?(?:ways?|steps|instructions) to",
            "howto",
        ),
        (r"^what are (?:the |some )?(?:(?:best|easiest|right|good) )?(?:ways|steps) to", "howto"),
        (r"^how (?:(?:do|can|could|should|would|might) (?:i|we|one)|to)", "howto"),
        (rf"^how (?:do|can|would) you(?= (?:{_DONE_BY_ANYBODY}) )", "howto"),
        # measures
        (r"how (?:tall|high) (?:is|are) (.+)", r"what is the height of \1"),
        (r"how (?:tall|high) (.+) (?:is|are)", r"what is the height of \1"),
        (r"how old (?:is|are) (.+)", r"what is the age of \1"),
        (r"how long (?:is|are) (.+)", r"what is the length of \1"),
        (r"how heavy (?:is|are) (.+)", r"what is the weight of \1"),
        (r"how much do (.+?) cost", r"what is the price of \1"),
        (r"how much (?:is|are) (.+)", r"what is the price of \1"),
        (r"how large (?:is|are) (.+)", r"what is the size of \1"),
        (r"how fast (?:is|are) (.+)", r"what is the speed of \1"),
        (r"how deep (?:is|are) (.+)", r"what is the depth of \1"),
        (r"how wide (?:is|are) (.+)", r"what is the width of \1"),
        (r"how far (?:is|are) (.+) from (.+)", r"what is the distance between \1 and \2"),
        (r"distance from (.+) to (.+)", r"distance between \1 and \2"),
        (r"cost of", "price of"),
        (r"how many (?:people|inhabitants) (?:live|are there|are) in (.+)", r"what is the population of \1"),
        (r"how many inhabitants do (.+) have", r"what is the population of \1"),
        (r"how many", "what is the number of"),
        (r"what do (.+) mean$", r"what is the meaning of \1"),
        (r"what time", "when"),
        (r"which city is the capital", "what is the capital"),
        (r"capital city", "capital"),
        # authors
        (r"who (?:is|was) the (?:author|writer) of", "who wrote"),
        (r"who (?:is|was) the inventor of", "who invented"),
        (r"who (?:is|was) the discoverer of", "who discovered"),
        (r"who (?:is|was) the founder of", "who founded"),
        # wishes
        (r"^(?:give me|give us|provide|list|name)(?: me)?(?= \d)", "list"),
        (r"^write (?:me|us)(?= an? )", "write"),
        (r"^(?:give (?:me|us)|provide|write) (?:a |the )?(?:short |brief )?summary of", "summarize"),
        (r"^(?:give (?:me|us)|provide) (?:an? |the )?(?:explanation|description|overview) of", "explain"),
        (r"^where can (?:i|we|one) find (.+)", r"where is \1"),
        (r"^where (?:is|are) (.+) (?:located|situated)$", r"where is \1"),
        (r"^((?:translate|convert) .+) into (.+)", r"\1 to \2"),
        (r"^((?:capital|population|meaning|height|age|price|size|author|currency|president) of .+)", r"what is \1"),
        # what a thing is
        (r"^(?:explain|describe|define)", "what is"),
        (r"^which", "what"),
        (r"^(?:the|an?)", "what"),
    )
)
_AUXILIARY = frozenset("is are am do can could should may might must will would has have was were did".split())
_PRESENT = frozenset("is are am".split())  # said or left out, the question is the same
_QUESTIONS = frozenset("yesno what who whose whom when where why how howto".split())
_ARTICLES = frozenset("the a an".split())
_OF = frozenset("of in".split())  # "symptoms of flu" is "flu symptoms"
_BOUND = frozenset(
    "to from with without by at on for than and or but not no never into onto over under before after between about "
    "against during since until as if when where who whom whose what why how which that this these those i you he she "
    "it we they my your his her its our their me him us them there any some all every each can could should may might "
    "must will would has have had was were did howto yesno do".split()
)

_NO_NOUN = _BOUND | _OF | _ARTICLES | _PRESENT


def gist(text: str) -> tuple[str, ...] | None:
    """None where the text is too long, or not plain enough to be put in other words."""
    text = unicodedata.normalize("NFKC", text).strip().replace("’", "'").replace("‘", "'")
    if not text or len(text) > MOST_CHARACTERS or _CODE.search(text):
        return None
    asks = text.rstrip(" !.'\"”").endswith("?")
    whole = " ".join(_words(text.rstrip(_ENDS)))
    said = _stripped(whole)
    asks = asks and whole.startswith(said)  # "Could you …?" asks for nothing else than "…"
    for pattern, same in _SAID:
        said = pattern.sub(same, said, count=1)
    words = said.split()
    if not words:
        return None
    if words[0] in _AUXILIARY:
        words = ["yesno", *(words if words[0] not in _PRESENT else words[1:])]
    found = _turned(words)
    if asks and words[0] not in _QUESTIONS:
        found.append("?")  # "He is here?" is not "He is here."
    return tuple(found) or None


def _words(text: str) -> list[str]:
    """In lower case, contractions written out, numbers in digits, of two spellings one."""
    shouted = text.isupper()
    words: list[str] = []
    for number, token in enumerate(_TOKEN.findall(text)):
        if token in _WORD_AS_NAME and not shouted and (number or len(token) > 1):
            words.append(f"={token}")
            continue
        named = number > 0 and token[:1].isupper()
        word = token.casefold()
        for part in _written_out(word).split():
            part = _NUMBERS.get(part, part)
            if not named:
                part = _singular(part)
            words.append(_SAME.get(part, part))
    return words


def _written_out(word: str) -> str:
    if word in _CONTRACTED:
        return _CONTRACTED[word]
    if word.endswith("n't"):
        return f"{word[:-3]} not"
    stem, apostrophe, end = word.partition("'")
    if apostrophe and end == "s":
        return f"{stem} is" if stem in _IS else stem
    if apostrophe and end == "re":
        return f"{stem} are"
    return word


def _singular(word: str) -> str:
    if len(word) < 4 or not word.isascii() or not word.isalpha() or word.endswith(("ss", "us", "is", "as")):
        return word
    if word in ("whose", "always", "steps", "ways"):
        return word
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word


def _stripped(said: str) -> str:
    while True:
        before = said
        for pattern in _BEFORE:
            said = pattern.sub("", said, count=1) if pattern.match(said) else said
        for pattern in _BEHIND:
            said = pattern.sub(r"\1" if pattern.groups else "", said)
        if said == before:
            return said


def _turned(words: list[str]) -> list[str]:
    """Without articles and what may be left out; "plot of the book" as "book plot"."""
    done: list[str] = []
    run = 0  # where the noun before a preposition begins
    index = 0
    while index < len(words):
        word = words[index]
        if word in _OF and run < len(done) and (noun := _noun(words, index + 1)):
            done[run:run] = noun[0]
            index = noun[1]
            continue
        index += 1
        if word in _ARTICLES:
            run = len(done)
        elif word in _PRESENT:
            run = len(done)
        else:
            done.append(word)
            if len(done) == 1 or word in _BOUND or word in _OF or not word[0].isalnum() or done[-2:-1] == ["howto"]:
                run = len(done)  # behind a verb of an instruction, too
    return done


def _noun(words: list[str], start: int) -> tuple[list[str], int] | None:
    """The words of a noun that begins at `start`, its article left out, and where it ends."""
    end = start + 1 if start < len(words) and words[start] in _ARTICLES else start
    found = []
    while end < len(words) and words[end] not in _NO_NOUN and words[end][0].isalnum():
        found.append(words[end])
        end += 1
    return (found, end) if found else None
