"""The data card and the licences beside the embedded data; called by make_embedded_data.py."""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from refine_control.data.source import open_dataset

SPLITS = ("train", "val", "test")
MICROSOFT_MIT = "MIT License\n\nCopyright (c) Microsoft Corporation.\n\n"
CARD = """# Embedded data

64 px pictures on white, WebP inside WebDataset shards (`KEY.webp` + `KEY.json`), made by
`scripts/make_embedded_data.py`, whose first lines say how to fetch the sources.

| source | version | licence | what |
|---|---|---|---|
| Fluent 3D emoji, npm `@lobehub/fluent-emoji-3d` | 1.1.0 | MIT, Microsoft (`LICENSES/fluent-emoji.txt`) | style "3d" |
| Noto emoji, npm `emoji-datasource-google` | 16.0.0 | Apache-2.0, Google (`LICENSES/noto-emoji.txt`) | style "flat" |
| emoji names, `emoji.json` of the same package | 16.0.0 | MIT, Cal Henderson (`LICENSES/emoji-data.txt`) | captions |
| Debian `openclipart-png` | 1:0.18+dfsg-19 | public domain (`LICENSES/openclipart.txt`) | drawings, no captions |

## Counts
{counts}

## Split by concept
A concept is a code point sequence without skin tone, gender and direction; emoji with the same name but for gender, and
series such as clock faces or families, are one concept. For clip art it is the folder and the first word of the file
name. Concepts are then joined wherever two pictures' 128-bit average and difference hashes differ in at most
{near} bits, over both domains. The split is drawn by the hash of the concept's name (of emoji {emoji}; of clip art
{openclipart}); concepts of more than {largest} pictures, those that hold pictures of both domains, and series of
look-alikes found by eye (arrows, cat faces, clouds, smiles ...) stay in train. Of clip art, at most {series_limit}
pictures of one folder and first word are kept.

## Left out
{dropped}

## Limits
Drawings on white; a few pieces of clip art are photographs. Captions are English: style, kind and name, as in "flat
animal mammal, koala"; the kinds are the emoji data's subcategories. Clip art of
the 2000s, by many hands, some with writing. Names follow Unicode, so "person" is often drawn in one way only.
"""


def write_card(
    out: Path, dropped: Counter, shares: Mapping[str, Mapping[str, float]], near: int, largest: int, series_limit: int
) -> None:
    """Counts what was really written, and says by what it was chosen: see the constants of make_embedded_data.py."""
    rows = ["| source | train | val | test |", "|---|---|---|---|"]
    for domain in ("emoji", "openclipart"):
        sets = {split: open_dataset(out / domain, split) for split in SPLITS}
        counts = {split: Counter(str(ds.extra(i)["source"]) for i in range(len(ds))) for split, ds in sets.items()}
        for source in sorted(counts["train"]):
            rows.append(f"| {source} | " + " | ".join(str(counts[split][source]) for split in SPLITS) + " |")
    left_out = "\n".join(f"- {what}: {count}" for what, count in sorted(dropped.items()))
    told = {name: ", ".join(f"{share:.0%} {split}" for split, share in of.items()) for name, of in shares.items()}
    limits = {"near": near, "largest": largest, "series_limit": series_limit}
    card = CARD.format(counts="\n".join(rows), dropped=left_out, **told, **limits)
    (out / "README.md").write_text(card, encoding="utf-8")


def write_licences(sources: Path, out: Path) -> None:
    """Copies each source's licence; the Fluent package names its licence without a text, so it is set out here."""
    folder = out / "LICENSES"
    folder.mkdir(parents=True, exist_ok=True)
    noto = sources / "emoji-datasource-google-16.0.0/package"
    henderson = (noto / "LICENSE").read_text(encoding="utf-8")
    shutil.copyfile(noto / "LICENSE", folder / "emoji-data.txt")
    terms = henderson[henderson.index("Permission is hereby granted") :]
    (folder / "fluent-emoji.txt").write_text(MICROSOFT_MIT + terms, encoding="utf-8")
    shutil.copyfile("/usr/share/common-licenses/Apache-2.0", folder / "noto-emoji.txt")
    shutil.copyfile(sources / "openclipart-png/usr/share/doc/openclipart-png/copyright", folder / "openclipart.txt")
