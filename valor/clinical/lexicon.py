"""The words the labeler knows: findings and organs, compiled together with `valor.clinical.grammar`.

The idea is the CheXpert labeler's (Irvin et al. 2019, arXiv 1901.07031): find mentions by phrases, then judge
each within its sentence. The phrases and their arrangement are VALOR's own. Everything compiles into one regular
expression, grouped by first letter so that a word costs a handful of comparisons; `TOKENS` names what each
group means. Matched against lower-case text. English only; spelling mistakes are not mended.
"""

import re
from collections import defaultdict
from typing import Any

from valor.clinical.grammar import GRAMMAR
from valor.clinical.vocabulary import Label

_ANY_FINDING = r"(?:disease|disorder|abnormalit(?:y|ies)|process(?:es)?|findings?|pathology|change|infiltrates?)"
_REGION = r"(?:cardio-? ?pulmonary|cardiac|cardiovascular|pulmonary|lung|intra-?thoracic|thoracic|chest|pleural)"

FINDING_PHRASES: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (r"mediastinal (?:widening|enlargement)", r"cardiomediastinal enlargement"),
    "Cardiomegaly": (r"cardiomegaly", r"cardiac enlargement", r"cardiac decompensation", r"large heart"),
    "Lung Opacity": (
        r"opacit(?:y|ies)",
        r"opacif\w+",
        r"infiltrat\w+",
        r"air-? ?space (?:disease|process|filling|densit\w+)",
        r"interstitial (?:marking|prominence|change|disease|pattern|thickening|lung disease|infiltrat|opacit)\w*",
        r"reticula(?:r|tion)\w*",
        r"reticulonodular",
        r"scar(?:s|ring)?",
        r"haz(?:e|y|iness)",
        r"ground-? ?glass",
        r"peribronchial (?:cuffing|thickening)",
        r"parenchymal (?:disease|densit|process|abnormalit)\w*",
        r"densit(?:y|ies)",
        r"fibro(?:sis|tic)\b(?: changes?)?",
        r"shadowing",
    ),
    "Lung Lesion": (
        r"nodul(?:es?|ar (?:opacit|densit|lesion|focus|foci|shadow)\w*|arity)",
        r"mass(?:es)?(?! effect)",
        r"mass-?like (?:opacit|densit|lesion|consolidation)\w*",
        r"(?:lung|pulmonary|parenchymal) lesions?",
        r"(?:cavitary|cystic) lesions?",
        r"tumou?rs?",
        r"neoplasms?",
        r"malignan(?:cy|t)",
        r"metasta(?:sis|ses|tic)(?: disease)?",
        r"coin lesions?",
    ),
    "Edema": (
        r"o?edema",
        r"(?:congestive )?(?:heart|cardiac) failure",
        r"chf",
        r"(?:pulmonary|venous|pulmonary venous) congestion",
        r"kerley",
        r"cephali[sz]ation",
        r"(?:fluid|volume) overload",
        r"(?:pulmonary )?vascular (?:congestion|engorgement|indistinctness|redistribution|prominence)",
    ),
    "Consolidation": (r"consolidat\w+",),
    "Pneumonia": (r"(?:broncho)?pneumonia", r"infect(?:ion|ious)(?: process| etiology| infiltrate)?"),
    "Atelectasis": (r"atelecta\w+", r"(?:volume loss|collapse)", r"loss of volume", r"collapsed lung"),
    "Pneumothorax": (r"pneumothora\w+", r"ptx"),
    "Pleural Effusion": (
        r"(?:pleural |subpulmonic )?effusions?",
        r"pleural (?:or|and) pericardial effusions?",
        r"pleural fluid",
        r"h(?:a?emo|ydro)thorax",
        r"layering fluid",
        r"empyema",
    ),
    "Pleural Other": (
        r"pleural[ -/](?:(?:based|peripheral|apical)[ -/])?(?:thicken|plaque|scar|calcif|abnormal)\w*",
        r"fibrothorax",
        r"pleur(?:al|o)[ -/]?parenchymal (?:scar|thicken|near|opacit)\w*",
        r"(?:apical|biapical) (?:capping|caps?)",
        r"apical pleural (?:thicken|scar)\w*",
    ),
    "Fracture": (r"fractur\w+", r"compression deformit(?:y|ies)"),
    "Support Devices": (
        r"pace-?makers?",
        r"pacers?",
        r"pacing (?:wire|lead|device)s?",
        r"icd",
        r"(?:cardiac )?defibrillators?",
        r"catheters?",
        r"picc(?: line)?",
        r"(?:central|venous|central venous|jugular|ij|subclavian|arterial) lines?",
        r"ports?",
        r"port-?a-?caths?",
        r"medi-?ports?",
        r"tubes?",
        r"ett",
        r"tracheostomy",
        r"dobh?off",
        r"(?:sternotomy|sternal) wires?",
        r"wires",
        r"(?:surgical |vascular )?clips",
        r"stents?",
        r"hardware",
        r"(?:prosthetic|mechanical|artificial) (?:\w+ )?valves?",
        r"valve replacement",
        r"drains?",
        r"(?:support |monitoring |implanted |medical |closure )?devices?",
        r"leads(?! to)",
        r"electrodes?",
        r"prosthesis",
        r"coils?",
        r"internal fixation",
        r"screws?",
    ),
}
"""Phrases that name a finding; a positive mention unless the sentence says otherwise."""

NEGATED_ONLY: dict[str, tuple[str, ...]] = {
    "Fracture": (
        r"(?:osseous|bony|bone|skeletal|displaced) (?:thoracic )?(?:abnormalit|injur|finding|change|lesion)\w*",
    ),
    "Lung Opacity": (r"focal (?:lung |pulmonary |parenchymal )?(?:abnormalit|process|lesion|disease)\w*",),
    "No Finding": (
        rf"(?:acute|active|significant|radiographic|acute or active) (?:radiographic )?(?:{_REGION} )*{_ANY_FINDING}",
        rf"{_REGION} {_ANY_FINDING}",
        r"disease",
        r"abnormalit(?:y|ies)",
    ),
}
"""Phrases that say something only when negated ("no acute osseous abnormality")."""

SUBJECTS: dict[str, tuple[str, ...]] = {
    "heart": (
        r"heart(?: size| shadow| silhouette| contours?)?(?! (?:failure|border|valve|disease|rate|transplant))",
        r"cardiac (?:size|silhouette|contours?|shadow|outline)s?",
        r"size of the heart",
    ),
    "mediastinum": (
        r"mediastinum",
        r"(?:superior )?mediastinal (?:silhouette|contour|width|structure|shadow|border)s?",
    ),
    "cardiomediastinum": (
        r"cardio-?mediastinal (?:silhouette|contour|structure|shadow|size)s?(?: and size)?",
        r"cardiomediastinum",
        r"cardiac(?: and |/| silhouette and )mediastinal (?:silhouette|contour|structure|shadow)s?",
    ),
    "lungs": (r"lungs?(?: fields?| parenchyma| zones?)?(?! ?markings| volumes?)",),
    "vessels": (
        r"pulmonary vascul\w+(?: markings| pattern)?",
        r"pulmonary vessels",
        r"vascular (?:markings|pattern)",
        r"vasculature",
    ),
    "pleura": (
        r"pleural (?:spaces?|surfaces?)",
        r"pleura",
        r"(?:lateral )?costophrenic (?:angle|sulc|recess)\w*",
        r"cp angles?",
    ),
    "bones": (
        r"(?:osseous|bony|skeletal) (?:structure|thorax|thoracic structure|element|skeleton)s?",
        r"bones",
        r"ribs",
        r"skeleton",
        r"thoracic cage",
    ),
    "chest": (
        r"chest(?: x-?ray| radiograph| exam(?:ination)?| study| film)?(?! (?:tube|wall|port|pain|ct|drain))",
        r"exam(?:ination)?",
    ),
}
"""Organs whose state a predicate tells ("heart size is normal")."""

NORMAL_MEANS: dict[str, tuple[str, ...]] = {
    "heart": ("Cardiomegaly",),
    "mediastinum": ("Enlarged Cardiomediastinum",),
    "cardiomediastinum": ("Enlarged Cardiomediastinum", "Cardiomegaly"),
    "lungs": ("Lung Opacity", "Consolidation", "Atelectasis", "Edema"),
    "vessels": ("Edema",),
    "pleura": ("Pleural Effusion",),
    "bones": ("Fracture",),
    "chest": ("No Finding",),
}
"""The findings that a normal organ excludes. Clear lungs exclude what darkens them, not diagnoses or nodules."""

ABNORMAL_MEANS: dict[tuple[str, str], Label] = {
    ("heart", "abnormal"): "positive",
    ("heart", "borderline"): "uncertain",
    ("mediastinum", "abnormal"): "positive",
    ("mediastinum", "borderline"): "uncertain",
    ("cardiomediastinum", "abnormal"): "positive",
    ("cardiomediastinum", "borderline"): "uncertain",
    ("vessels", "congested"): "positive",
    ("vessels", "abnormal"): "uncertain",
    ("vessels", "borderline"): "uncertain",
    ("pleura", "blunted"): "uncertain",
}
"""What an abnormal predicate says of an organ's first finding in `NORMAL_MEANS`; nothing for other pairs."""


def _unfold(pattern: str) -> list[str]:
    """Rewrite a pattern as alternatives that each begin with a literal letter."""
    if pattern.startswith("(?:"):
        depth, cuts, i = 0, [2], 0
        for i, char in enumerate(pattern):
            depth += (char == "(") - (char == ")")
            if char == "|" and depth == 1:
                cuts.append(i)
            if depth == 0 and i:
                break
        rest = pattern[i + 1 :]
        options = [pattern[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], i], strict=True)]
        if rest[:1] == "?":
            rest = rest[1:]
            options.append("")
        return [full for option in options for full in _unfold(option + rest)]
    if pattern[1:2] == "?":
        return [pattern[0] + pattern[2:], *_unfold(pattern[2:])]
    return [pattern]


def _compile() -> tuple[re.Pattern[str], list[tuple[str, Any]]]:
    """Return the one regular expression and, by group number, each group's (kind, value)."""
    entries: list[tuple[str, tuple[str, Any]]] = []
    for kind, table in (("find", FINDING_PHRASES), ("find_neg", NEGATED_ONLY), ("subj", SUBJECTS)):
        entries += [(p, (kind, name)) for name, patterns in table.items() for p in patterns]
    entries += [(p, key) for key, patterns in GRAMMAR.items() for p in patterns]
    by_letter: dict[str, list[tuple[str, tuple[str, Any]]]] = defaultdict(list)
    for pattern, token in entries:
        for unfolded in _unfold(pattern):
            by_letter[unfolded[0]].append((unfolded[1:], token))
    tokens: list[tuple[str, Any]] = [("", None), ("comma", None), ("break", None)]
    branches = [",()", "[()]()"]
    for letter, members in by_letter.items():
        # The longer pattern is the more specific reading; Python takes the first alternative that fits.
        members.sort(key=lambda m: -len(m[0]))
        # The group is empty and stands last, so that a branch begins with a literal, which `re` rejects fastest.
        branches.append(rf"\b{letter}(?:" + "|".join(rf"{pattern}\b()" for pattern, _ in members) + ")")
        tokens += [token for _, token in members]
    # The first look-ahead lets `re` pass over other characters without trying a branch.
    return re.compile(f"(?=[,(){''.join(by_letter)}])(?:" + "|".join(branches) + ")"), tokens


LEXER, TOKENS = _compile()
