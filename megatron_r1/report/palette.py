"""Colours: a hue family per domain, a shade per source, the same in every figure, for light and dark.

Blue, orange, teal and magenta stay apart under the common colour-vision deficiencies; shades differ in
lightness, and every curve also carries its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_r1.records import CAPABILITIES

LIGHT = {
    "page": "#f7f6f3",
    "card": "#ffffff",
    "ink": "#1c1f24",
    "muted": "#5d636d",
    "grid": "#e4e2dc",
    "axis": "#9a9ea6",
    "control": "#6b7078",
    "positive": "31 95 168",
    "negative": "199 80 0",
}
DARK = {
    "page": "#131518",
    "card": "#1b1e22",
    "ink": "#eae8e3",
    "muted": "#a0a5ad",
    "grid": "#30343a",
    "axis": "#6d727a",
    "control": "#a6abb3",
    "positive": "108 176 245",
    "negative": "255 140 60",
}

FAMILIES = ("blue", "orange", "teal", "magenta", "olive", "grey")
LIGHT_SHADES = {
    "blue": ("#1f5fa8", "#3f8fdc", "#0b3266", "#6b86c9"),
    "orange": ("#c75000", "#d98200", "#7c3000", "#b87333"),
    "teal": ("#00796b", "#1e9e86", "#00423a", "#5b8f84"),
    "magenta": ("#a8286e", "#cf5fa3", "#611442", "#a4658d"),
    "olive": ("#6b6b00", "#8f8a1e", "#424200", "#85855a"),
    "grey": ("#4f555e", "#7d838c", "#2a2e34", "#8b8378"),
}
DARK_SHADES = {
    "blue": ("#6cb0f5", "#3d86d8", "#b4d6fb", "#8ea4e0"),
    "orange": ("#ff9a45", "#d27414", "#ffcb98", "#d6a06a"),
    "teal": ("#3fc9ad", "#1f9c86", "#a5e8da", "#86b5ab"),
    "magenta": ("#ea83bd", "#c65a9f", "#f8c1e0", "#c795b4"),
    "olive": ("#c9c24a", "#98922a", "#e6e2a0", "#b3b08a"),
    "grey": ("#b8bdc5", "#868c95", "#dfe2e6", "#a8a094"),
}


def domain_order(domains: Mapping[str, str]) -> list[str]:
    """Capabilities first, in their own order, then whatever else the sources name."""
    named = list(dict.fromkeys(domains.values()))
    return [c for c in CAPABILITIES if c in named] + [d for d in named if d not in CAPABILITIES]


def families(domains: Mapping[str, str]) -> dict[str, str]:
    """Domain -> hue family. A capability always has its own; other domains take what is left, in order."""
    out = {name: FAMILIES[i] for i, name in enumerate(CAPABILITIES)}
    spare = FAMILIES[len(CAPABILITIES) :]
    others = [d for d in domain_order(domains) if d not in out]
    return {**out, **{name: spare[i % len(spare)] for i, name in enumerate(others)}}


def source_colors(domains: Mapping[str, str]) -> dict[str, str]:
    """Source -> CSS colour, from source -> domain."""
    family, used, out = families(domains), dict.fromkeys(FAMILIES, 0), {}
    for source, domain in domains.items():
        hue = family[domain]
        out[source] = f"var(--{hue}-{used[hue] % len(LIGHT_SHADES[hue])})"
        used[hue] += 1
    return out


def capability_colors(capabilities: list[str]) -> dict[str, str]:
    """Capability -> the first shade of its domain's family."""
    family = families({c: c for c in capabilities})
    return {c: f"var(--{family[c]}-0)" for c in capabilities}


def variables(base: Mapping[str, str], shades: Mapping[str, tuple[str, ...]]) -> str:
    """The CSS custom properties of one mode."""
    named = {**base, **{f"{hue}-{i}": c for hue, colors in shades.items() for i, c in enumerate(colors)}}
    return "".join(f"--{name}:{color};" for name, color in named.items())
