"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const holder = byId("cards");
  const cards = Array.from(holder.children, (element) => ({
    element,
    study: element.dataset.study,
    outcomes: JSON.parse(element.dataset.outcomes),
    numbers: JSON.parse(element.dataset.numbers),
  }));
  const controls = ["finding", "outcome", "stage", "order"].map(byId);
  const [finding, outcome, stage, order] = controls;

  function fits(card) {
    const stages = stage.value ? [card.outcomes[stage.value]] : Object.values(card.outcomes);
    return stages.some((found) => {
      const lists = outcome.value ? [found[outcome.value]] : Object.values(found);
      if (finding.value) return lists.some((list) => list.includes(finding.value));
      return !outcome.value || lists.some((list) => list.length > 0);
    });
  }

  function rank(card) {
    return order.value === "better" ? -card.numbers.worse : card.numbers[order.value];
  }

  function update() {
    let shown = 0;
    for (const card of cards) {
      card.element.hidden = !fits(card);
      shown += card.element.hidden ? 0 : 1;
    }
    const sorted = [...cards].sort((a, b) => {
      const gap = order.value === "study" ? 0 : rank(b) - rank(a);
      return gap || (a.study < b.study ? -1 : 1);
    });
    holder.append(...sorted.map((card) => card.element));
    byId("count").textContent = `${shown} of ${cards.length} studies`;
    byId("nothing").hidden = shown > 0;
  }

  function clear(card) {
    card.querySelectorAll('button[aria-pressed="true"]').forEach((b) => b.setAttribute("aria-pressed", "false"));
    card.querySelectorAll(".outline").forEach((o) => o.classList.remove("dim"));
    card.querySelector(".heat").hidden = true;
    card.querySelector(".caption").textContent = "";
  }

  function look(button) {
    const card = button.closest(".card");
    const wasOn = button.getAttribute("aria-pressed") === "true";
    clear(card);
    if (wasOn) return;
    button.setAttribute("aria-pressed", "true");
    const heat = card.querySelector(".heat");
    heat.src = button.dataset.map;
    heat.hidden = false;
    card.querySelectorAll(".outline").forEach((o) => o.classList.toggle("dim", o.dataset.finding !== button.dataset.finding));
    const where = `${button.dataset.stage}, where it looked for ${button.dataset.finding}`;
    card.querySelector(".caption").textContent = button.dataset.ratio
      ? `${where}: ${button.dataset.ratio} times even attention inside the outline (${button.dataset.shuffled} under another study's image).`
      : `${where}; no outline to compare with.`;
  }

  controls.forEach((control) => control.addEventListener("change", update));
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  byId("outlines").addEventListener("change", (event) => holder.classList.toggle("no-outlines", !event.target.checked));
  byId("reset").addEventListener("click", () => {
    finding.value = outcome.value = stage.value = "";
    update();
  });
  holder.addEventListener("click", (event) => {
    const button = event.target.closest("button.seg");
    if (button) look(button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cards.forEach((card) => clear(card.element));
  });
  update();
})();
