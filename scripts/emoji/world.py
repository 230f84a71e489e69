"""The world of the default bundle: its things, places and times, and how captions name them.

Its objects come in a fixed order; a smaller world takes the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A line each: glyph, name, other names.
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    names.split(", ")[0]: (glyph, tuple(names.split(", ")))
    for glyph, names in (line.split(" ", 1) for line in """\
🐱 cat, kitten
🐶 dog, puppy
🍎 apple, red apple
🚗 car, red car
🚀 rocket, spaceship
🐘 elephant
🍓 strawberry
⛵ sailboat, sailing boat
🦊 fox, red fox
🎈 balloon, red balloon
🏠 house, home
🍌 banana
🐧 penguin
🚒 fire engine, fire truck
🍕 slice of pizza, pizza
🤖 robot
🐸 frog, green frog
🎁 gift, present
🚲 bicycle, bike
🍔 hamburger, burger
🦉 owl
⚽ football, soccer ball
🐷 pig, piglet
🎂 birthday cake, cake
🐢 turtle, tortoise
🦄 unicorn
🍄 mushroom, toadstool
🚌 bus
🐼 panda, panda bear
🎸 guitar
🍉 slice of watermelon, watermelon
⛄ snowman
🐯 tiger
🍇 bunch of grapes
🦋 butterfly
🍦 ice cream, ice cream cone
☂ umbrella
🦀 crab
🚜 tractor
🌻 sunflower
🐴 horse
🍩 donut, doughnut
🐙 octopus
👻 ghost
🐔 chicken, hen
🥕 carrot
🚁 helicopter
🐳 whale
🏰 castle
🍋 lemon
🦁 lion
🐵 monkey
🐻 bear, brown bear
🐰 rabbit, bunny
🐮 cow
🐨 koala
🐭 mouse
🐹 hamster
🐺 wolf
🐗 boar, wild boar
🐝 bee
🐞 ladybug, ladybird
🐛 caterpillar
🐌 snail
🐜 ant
🕷 spider
🦂 scorpion
🐍 snake
🦎 lizard
🐊 crocodile
🦖 dinosaur, tyrannosaurus
🐠 tropical fish
🐡 pufferfish
🦈 shark
🐬 dolphin
🦑 squid
🦐 shrimp
🐆 leopard
🦓 zebra
🦍 gorilla
🦒 giraffe
🦘 kangaroo
🐪 camel
🦏 rhinoceros, rhino
🦛 hippopotamus, hippo
🐐 goat
🐑 sheep
🦙 llama
🐿 squirrel
🦔 hedgehog
🦇 bat
🦜 parrot
🦚 peacock
🦩 flamingo
🦢 swan
🦆 duck
🦅 eagle
🐓 rooster
🦃 turkey
🦌 deer
🦥 sloth
🦦 otter
🦨 skunk
🦡 badger
🐲 dragon
🍊 orange, tangerine
🍐 pear
🍑 peach
🍒 cherry, pair of cherries
🍍 pineapple
🥝 kiwi
🥥 coconut
🥑 avocado
🍅 tomato
🍆 eggplant, aubergine
🥔 potato
🌽 ear of corn, corn cob
🌶 hot pepper, chili pepper
🥒 cucumber
🥦 broccoli
🧄 garlic bulb
🧅 onion
🥜 peanut
🍞 loaf of bread
🥐 croissant
🥖 baguette
🥨 pretzel
🧀 piece of cheese
🥚 egg
🥓 strip of bacon
🌭 hot dog
🌮 taco
🌯 burrito
🍟 box of fries
🍿 box of popcorn
🍣 piece of sushi
🍪 cookie, biscuit
🧁 cupcake, muffin
🍫 chocolate bar
🍭 lollipop
🍯 honey pot
🍼 baby bottle
☕ cup of coffee, coffee
🍵 cup of tea
🍷 glass of wine
🍺 mug of beer
🚕 taxi, cab
🚓 police car
🚑 ambulance
🚚 truck, lorry
🏍 motorcycle, motorbike
🛴 scooter
🚂 locomotive, steam train
🚋 tram
✈ airplane, plane
🛸 flying saucer, ufo
🚢 ship, ocean liner
⚓ anchor
🛶 canoe
🌵 cactus
🌲 pine tree, fir
🌴 palm tree
🌷 tulip
🌹 rose
🌸 cherry blossom
🍁 maple leaf
🍀 clover, lucky clover
🌍 globe
⭐ star
☀ sun
🌈 rainbow
⛺ tent
🏭 factory
⛪ church
🗼 tower
🗽 statue of liberty
🎡 ferris wheel
⛲ fountain
⌚ watch
📱 phone, smartphone
💻 laptop, computer
📷 camera
📺 television
⏰ alarm clock
🔦 flashlight, torch
💡 light bulb
🔑 key
🔨 hammer
🪓 axe
✂ pair of scissors
📎 paperclip
✏ pencil
📚 stack of books
🎒 backpack
👑 crown
💍 ring, diamond ring
👟 sneaker, running shoe
👢 boot
👒 sun hat
👗 dress
👓 pair of glasses
🧦 pair of socks
🧤 pair of gloves
🎩 top hat
🪑 chair
🛏 bed
🛁 bathtub
🚪 door
🕯 candle
🧸 teddy bear
🎻 violin
🎺 trumpet
🥁 drum
🎷 saxophone
🎹 piano, keyboard
🎨 palette
🎲 die
🎯 dartboard
🏀 basketball
🏈 american football
🎾 tennis ball
🎳 bowling ball
🏆 trophy
🥊 boxing glove
🛹 skateboard
🪁 kite
🎃 jack-o'-lantern
🎄 christmas tree
💎 diamond, gem
🔔 bell
🧲 magnet
🔭 telescope
👽 alien
🤡 clown
🎅 santa claus
🏄 surfer
🏂 snowboarder
🏊 swimmer
🚴 cyclist
💃 dancer
🧗 climber
🤹 juggler
🧙 wizard
🧜 mermaid
""".splitlines())}

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach", "by the sea"),
    "sea": ("in the sea", "on the ocean", "in the waves", "out at sea"),
    "forest": ("in the forest", "in the woods", "in a forest", "among trees"),
    "meadow": ("on a meadow", "in a field of flowers", "on green grass", "in a green field"),
    "mountains": ("in the mountains", "on a rocky mountain", "in front of snowy peaks",
                  "high up in the mountains"),
    "snow": ("in the snow", "on the snow", "in a snowy landscape", "in winter"),
    "desert": ("in the desert", "on a sand dune", "in a desert with cactuses", "among cactuses"),
    "city": ("in the city", "on a city street", "on the road in town", "in front of buildings"),
    "kitchen": ("on the kitchen table", "in the kitchen", "on a wooden table",
                "on a table indoors"),
    "farm": ("on the farm", "in front of a barn", "on a farm with a red barn", "by the barn"),
    "volcano": ("on a volcano", "in front of a volcano", "among lava", "by the lava of a volcano"),
    "moon": ("on the moon", "on the surface of the moon", "among craters", "in outer space"),
}
TIMES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "during the day", "on a sunny day", "in daylight", "under a blue sky"),
    "sunset": ("at sunset", "at dusk", "in the evening", "under an orange sky"),
    "night": ("at night", "by night", "under the stars", "in the dark", "in the moonlight"),
    "rain": ("in the rain", "on a rainy day", "in rainy weather", "under dark clouds"),
}
TIMELESS = ("moon",)  # its sky is always black
COLOURS: dict[str, tuple[int, int, int]] = {  # plain backgrounds, which are places too
    "red": (214, 58, 52), "orange": (240, 146, 48), "yellow": (246, 218, 84),
    "green": (86, 170, 92), "blue": (70, 128, 220), "purple": (140, 84, 190),
    "pink": (246, 168, 196), "white": (244, 244, 246), "grey": (140, 144, 150),
}
PLAIN = ("on {a} background", "on plain {}", "against {a} background", "in front of {a} wall")
PLAIN_SHARE, PAIR_SHARE, TWINS = 0.08, 0.35, 0.15  # of scenes; of scenes; of pairs
FAMILY = 4  # scenes that differ in little, see `relative`

ONE = ("{thing} {where} {when}", "{thing} {where} {when}", "{when}, {thing} {where}",
       "{thing} {when} {where}", "a picture of {thing} {where} {when}", "{where} {when}: {thing}",
       "there is {thing} {where} {when}", "here you can see {thing} {where} {when}",
       "look at {thing} {where} {when}", "{thing}, {where}, {when}")
# No training caption is put like these, whose words all occur in training.
UNSEEN = ("{when} you can see {thing} {where}", "{where}, look: {thing} {when}",
          "here is {thing} {where}, {when}", "a picture, {where} {when}, of {thing}")
# As one reads: the first is on the left, unless the words say otherwise.
PAIRS = ("{left} and {right}", "{left} and {right}", "{left} next to {right}",
         "{left} beside {right}", "{left} to the left of {right}",
         "{right} to the right of {left}", "{left} on the left and {right} on the right")
SAME = ("two {many}", "two {many}", "a pair of {many}", "two {many} side by side")
PLURALS = {"mouse": "mice", "wolf": "wolves", "sheep": "sheep", "deer": "deer", "squid": "squid",
           "shrimp": "shrimp", "tropical fish": "tropical fish", "pufferfish": "pufferfish",
           "maple leaf": "maple leaves", "snowman": "snowmen", "loaf": "loaves",
           "die": "dice", "santa claus": "santa clauses"}


@dataclass(frozen=True)
class Labels:
    """What a scene shows: one object or two, from left to right; a place or the colour of a plain
    background; a time, None where there is no telling."""

    objects: tuple[str, ...]
    place: str
    time: str | None


def _held_out() -> frozenset[tuple[str, str]]:
    """A tenth of all (object, place), all places alike; of a smaller world a tenth too."""
    rng, deck, pairs = np.random.default_rng(2203), [], set()
    for i, name in enumerate(OBJECTS):
        for _ in range(1 + (i % 5 == 0)):
            deck = deck or rng.permutation(list(PLACES)).tolist()
            pairs.add((name, deck.pop()))
    return frozenset(pairs)


HELD_OUT = _held_out()  # these appear in no training


def is_held_out(labels: Labels) -> bool:
    return any((name, labels.place) in HELD_OUT for name in labels.objects)


def draw_labels(rng: np.random.Generator, objects: int,
                pair_share: float = PAIR_SHARE) -> Labels:
    """Of a world with the first so many objects, held out or not; two things in `pair_share`."""
    names = list(OBJECTS)[:objects]
    first, second = (names[i] for i in rng.integers(len(names), size=2))
    if rng.random() < pair_share:
        chosen = (first, first) if rng.random() < TWINS else (first, second)
    else:
        chosen = (first,)
    if rng.random() < PLAIN_SHARE:
        return Labels(chosen, list(COLOURS)[rng.integers(len(COLOURS))], None)
    place = list(PLACES)[rng.integers(len(PLACES))]
    time = list(TIMES)[rng.integers(len(TIMES))]
    return Labels(chosen, place, None if place in TIMELESS else time)


def relative(rng: np.random.Generator, labels: Labels, which: int, objects: int) -> Labels:
    """One of a family of four that differ in as little as two scenes can.

    0: the labels themselves.  1: another object instead of one of them.  2: of two, each where the
    other was; of one or twins, another beside it.  3: one of two alone; of one, elsewhere.  Of two
    either may be the one: a CLIP looks less at a thing that is never exchanged.
    """
    names = [name for name in list(OBJECTS)[:objects] if name not in labels.objects]
    first, last, place, time = labels.objects[0], labels.objects[-1], labels.place, labels.time
    other = names[rng.integers(len(names))] if names else first
    side = int(rng.integers(len(labels.objects)))
    if which == 1:
        changed = [*labels.objects]
        changed[side] = other
        return Labels(tuple(changed), place, time)
    if which == 2:
        return Labels((last, first) if last != first else (first, other), place, time)
    if which == 3 and len(labels.objects) == 2:
        return Labels((labels.objects[side],), place, time)
    if which == 3:
        elsewhere = draw_labels(rng, objects)
        return Labels(labels.objects, elsewhere.place, elsewhere.time)
    return labels


def article(noun: str) -> str:
    vowel = noun[0] in "aeiou" and not noun.startswith(("unicorn", "ufo"))
    return ("an " if vowel else "a ") + noun


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    head, of, rest = noun.partition(" of ")
    if of:
        return plural(head) + of + rest
    if head.endswith(("s", "x", "ch", "sh", "tomato", "potato")):
        return head + "es"
    return head[:-1] + "ies" if head.endswith("y") and head[-2] not in "aeiou" else head + "s"


def write_caption(rng: np.random.Generator, labels: Labels, *, place: bool = True,
                  time: bool = True, unseen: bool = False) -> str:
    """A caption in one of many wordings; without place or time these are left unsaid.

    unseen: in a wording that no training caption has.
    """
    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    names = [pick(OBJECTS[name][1]) for name in labels.objects]
    if len(names) == 1:
        thing = article(names[0])
    elif labels.objects[0] == labels.objects[1]:
        thing = pick(SAME).format(many=plural(names[0]))
    else:
        thing = pick(PAIRS).format(left=article(names[0]), right=article(names[1]))
    where = when = ""
    if place:
        where = (pick(PLACES[labels.place]) if labels.place in PLACES else
                 pick(PLAIN).format(labels.place, a=article(labels.place)))
    if time and labels.time:
        when = pick(TIMES[labels.time])
    pattern = pick(UNSEEN if unseen else ONE)
    words = " ".join(pattern.format(thing=thing, where=where, when=when).split())
    for gap in (" ,", ", ,", ",,"):
        words = words.replace(gap, ",")
    return words.replace(" :", ":").replace(",:", ":").strip(",: ")
