import torch
from conftest import REPORTS, SMALL_BASE
from PIL import Image

from valor.models.generate import generate_reports
from valor.models.loading import messages
from valor.models.tiny import build_llava
from valor.models.train_base import teach_reports

PROMPT = "Describe the image."
IMAGES = torch.randint(0, 255, (len(REPORTS), 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def pictures():
    return [Image.fromarray(image.numpy()).convert("RGB") for image in IMAGES]


def losses_of_teaching(model, processor, steps):
    losses = []
    teach_reports(
        model, processor, IMAGES, REPORTS, prompt=PROMPT, steps=steps, seed=0,
        after=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    return losses


def test_the_first_loss_is_the_whole_models_on_the_same_conversations():
    model, processor = build_llava(SMALL_BASE, REPORTS, seed=1)
    asked = processor.apply_chat_template(messages(PROMPT), add_generation_prompt=True)
    texts = [asked + report + processor.tokenizer.eos_token for report in REPORTS]
    inputs = processor(text=texts, images=pictures(), return_tensors="pt", padding=True, padding_side="right")
    start = processor(text=[asked], images=pictures()[:1], return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :start] = -100
    with torch.no_grad():
        expected = float(model(**inputs, labels=labels).loss)
    assert abs(losses_of_teaching(model, processor, steps=1)[0] - expected) < 1e-4


def test_it_learns_to_tell_the_images_apart_and_leaves_the_tower_alone():
    model, processor = build_llava(SMALL_BASE, REPORTS, seed=1)
    tower = {name: weight.clone() for name, weight in model.model.vision_tower.state_dict().items()}
    losses = losses_of_teaching(model, processor, steps=300)
    assert losses[-1] < 0.3 * losses[0]
    written = generate_reports(model, processor, pictures(), prompt=PROMPT, max_new_tokens=80, batch_size=4)
    assert [report.text[:40] for report in written] == [report[:40] for report in REPORTS]
    assert all(torch.equal(weight, tower[name]) for name, weight in model.model.vision_tower.state_dict().items())
