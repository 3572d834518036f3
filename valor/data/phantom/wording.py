"""The phantom radiologist's words: sentence templates per finding, in ordinary radiology English.

Fields are filled by `report._Writer.words`. The last template of a list longer than `HOLD_OUT_FROM` is held out:
used only when asked for. Only the phantom reads this module; no reward or metric may.
"""

from collections.abc import Mapping, Sequence

HOLD_OUT_FROM = 3
"""Lists with more templates than this hold out their last one."""

SIZE = {"mild": ("small", "trace"), "moderate": ("moderate", "moderate-sized"), "severe": ("large",)}
DEGREE = {"mild": ("mild",), "moderate": ("moderate",), "severe": ("severe", "marked")}
ZONE_WORDS: Mapping[str, Sequence[str]] = {
    "upper": ("{side} upper lobe", "{side} upper lung", "{side} upper zone"),
    "mid": ("{side} mid lung", "{side} mid zone"),
    "lower": ("{side} lower lobe", "{side} lung base", "{side} lower lung"),
}
BILATERAL_ZONE_WORDS: Mapping[str, Sequence[str]] = {
    "upper": ("bilateral upper lobes", "both upper lungs"),
    "mid": ("bilateral mid lungs", "both mid lungs"),
    "lower": ("bilateral lower lobes", "both lung bases"),
}

FINDING: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": (
        "There is {degree} cardiomegaly.",
        "The heart is {degree_ly} enlarged.",
        "The cardiac silhouette is {degree_ly} enlarged.",
        "{degree} enlargement of the heart is present.",
    ),
    "Enlarged Cardiomediastinum": (
        "There is {degree} widening of the mediastinum.",
        "The mediastinum is {degree_ly} widened.",
        "The superior mediastinum is {degree_ly} enlarged.",
        "{degree} mediastinal widening is noted.",
    ),
    "Edema": (
        "There is {degree} pulmonary edema.",
        "{degree} interstitial edema is present.",
        "Perihilar opacities are consistent with {degree} pulmonary edema.",
        "{degree} edema with pulmonary vascular congestion is seen.",
    ),
    "Consolidation": (
        "There is {degree} consolidation in the {place}.",
        "Consolidation is seen in the {place}, compatible with pneumonia.",
        "There is an airspace opacity in the {place}, compatible with pneumonia.",
        "A focal consolidation is present in the {place}.",
        "The {place} is consolidated.",
    ),
    "Atelectasis": (
        "There is {degree} {side} {basal} atelectasis.",
        "Linear opacities in the {place} are consistent with {degree} atelectasis.",
        "{degree} atelectasis is present in the {place}.",
        "There is {degree} volume loss and atelectasis in the {place}.",
    ),
    "Lung Lesion": (
        "There is a {mass} in the {place}.",
        "A {mass} is seen in the {place}.",
        "A {mass} projects over the {place}.",
        "A rounded {mass} is noted in the {place}.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "A {size} {side} pneumothorax is present.",
        "A {size} {side}-sided pneumothorax is seen.",
        "A {size} pneumothorax is noted on the {side}.",
    ),
    "Pleural Effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} {side} pleural effusion is present.",
        "A {size} {side}-sided pleural effusion is seen.",
        "A {size} pleural effusion is noted on the {side}.",
    ),
    "Fracture": (
        "There is a {break_} fracture of a {side} {zone} rib.",
        "A {break_} {side} rib fracture is seen in the {zone} chest.",
        "A {break_} fracture of a {side} rib is present.",
        "A {side} {zone} rib is fractured and {break_}.",
    ),
}
PLURAL: Mapping[str, Sequence[str]] = {
    "Pleural Effusion": (
        "There are {size} bilateral pleural effusions.",
        "{size} bilateral pleural effusions are present.",
        "{size} pleural effusions are seen on both sides.",
    ),
    "Atelectasis": (
        "There is {degree} bibasilar atelectasis.",
        "{degree} bilateral atelectasis is present.",
        "Bibasilar opacities are consistent with {degree} atelectasis.",
    ),
}
DEVICE: Mapping[str, Sequence[str]] = {
    "endotracheal tube": (
        "An endotracheal tube is in place.",
        "The endotracheal tube terminates above the carina.",
        "The patient is intubated with an endotracheal tube in standard position.",
    ),
    "nasogastric tube": (
        "A nasogastric tube terminates in the stomach.",
        "An enteric tube courses below the diaphragm.",
        "A nasogastric tube is in place.",
    ),
    "central line": (
        "A {side} central venous catheter terminates in the SVC.",
        "A {side}-sided central line is in place.",
        "A {side} PICC line terminates in the SVC.",
    ),
    "pacemaker": (
        "A {side}-sided pacemaker is in place.",
        "A {side} chest wall pacemaker is seen.",
        "A {side} pacemaker with a lead in the right ventricle is present.",
    ),
    "chest tube": (
        "A {side} chest tube is in place.",
        "A {side}-sided chest tube is seen.",
        "A {side} pleural drainage catheter is present.",
    ),
}
HEDGE: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": ("Possible mild cardiomegaly.", "The heart may be mildly enlarged."),
    "Enlarged Cardiomediastinum": (
        "Possible mild widening of the mediastinum.",
        "The mediastinum may be mildly widened.",
    ),
    "Edema": ("Possible mild pulmonary edema.", "Mild pulmonary edema cannot be excluded."),
    "Consolidation": ("An opacity in the {place} may represent pneumonia.", "Possible consolidation in the {place}."),
    "Atelectasis": (
        "A linear opacity in the {place} may represent atelectasis.",
        "Possible mild atelectasis in the {place}.",
    ),
    "Lung Lesion": (
        "Possible small nodule in the {place}.",
        "A rounded opacity in the {place} may represent a nodule.",
    ),
    "Pneumothorax": ("Possible small {side} pneumothorax.", "A small {side} pneumothorax cannot be excluded."),
    "Pleural Effusion": (
        "Possible small {side} pleural effusion.",
        "A small {side} pleural effusion cannot be excluded.",
    ),
    "Fracture": ("Possible nondisplaced fracture of a {side} {zone} rib.", "A {side} rib fracture cannot be excluded."),
}
SHORT: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": ("{degree} cardiomegaly.",),
    "Enlarged Cardiomediastinum": ("{degree} mediastinal widening.", "Widened mediastinum."),
    "Edema": ("{degree} pulmonary edema.",),
    "Consolidation": ("{side} {zone} lung consolidation.", "{side} {zone} lung pneumonia."),
    "Atelectasis": ("{side} {basal} atelectasis.",),
    "Lung Lesion": ("{side} {zone} lung {noun}.",),
    "Pneumothorax": ("{size} {side} pneumothorax.",),
    "Pleural Effusion": ("{size} {side} pleural effusion.",),
    "Fracture": ("{side} rib fracture.",),
}
SHORT_PLURAL = {
    "Pleural Effusion": ("{size} bilateral pleural effusions.",),
    "Atelectasis": ("Bibasilar atelectasis.",),
}
NEGATIVE: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": ("The heart is normal in size.", "Heart size is normal.", "The cardiac silhouette is normal."),
    "Enlarged Cardiomediastinum": ("The mediastinum is normal.", "The mediastinal contours are normal."),
    "Edema": ("No pulmonary edema.", "There is no pulmonary edema."),
    "Consolidation": ("No focal consolidation.", "There is no focal consolidation."),
    "Atelectasis": ("No atelectasis.", "There is no atelectasis."),
    "Lung Lesion": ("No nodule or mass.", "There is no pulmonary nodule or mass."),
    "Pneumothorax": ("No pneumothorax.", "There is no pneumothorax."),
    "Pleural Effusion": ("No pleural effusion.", "There is no pleural effusion."),
    "Fracture": ("No fracture.", "No acute osseous abnormality.", "No rib fracture is seen."),
}
PAIR_NEGATIVE: Mapping[tuple[str, str], Sequence[str]] = {
    ("Cardiomegaly", "Enlarged Cardiomediastinum"): (
        "The cardiomediastinal silhouette is normal.",
        "Heart size and mediastinal contours are normal.",
    ),
    ("Pneumothorax", "Pleural Effusion"): (
        "No pleural effusion or pneumothorax.",
        "There is no pleural effusion or pneumothorax.",
    ),
}
CLEAR_LUNGS = ("The lungs are clear.", "Lungs are clear.", "No focal consolidation or pulmonary edema.")
NORMAL = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No evidence of acute cardiopulmonary disease.",
)
PRIOR_SAME = (
    "Compared with the prior study, there is no significant change.",
    "In comparison with the prior radiograph, findings are unchanged.",
    "The appearance is stable from the prior examination.",
)
PRIOR_FINDING = (
    "Compared with the prior study, the {noun} is unchanged.",
    "The {noun} has increased since the prior radiograph.",
    "The {noun} is stable from the prior examination.",
    "The {noun} has decreased since the prior study.",
)
NOUN = {
    "Cardiomegaly": "cardiomegaly",
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Fracture": "rib fracture",
}
INDICATION = (
    "___ year old patient with shortness of breath.",
    "___ year old patient with chest pain.",
    "___ year old patient with cough and fever.",
    "___ year old patient, evaluate for acute process.",
)
