"use strict";
{
  const tip = document.getElementById("tip");
  let shown = null;

  // The caption of a column: the browser's own tooltip is slow and does not come on a touch screen.
  for (const column of document.querySelectorAll(".column")) {
    const caption = column.querySelector("title").textContent.split("\n");
    column.replaceChildren();
    const show = (event) => {
      if (shown) shown.classList.remove("shown");
      shown = column;
      column.classList.add("shown");
      tip.replaceChildren(...caption.map((line) => {
        const row = document.createElement("div");
        row.textContent = line;
        return row;
      }));
      tip.hidden = false;
      const room = document.documentElement;
      const left = Math.min(event.clientX + 14, room.clientWidth - tip.offsetWidth - 8);
      const below = event.clientY + 18;
      const fits = below + tip.offsetHeight < room.clientHeight;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${Math.max(8, fits ? below : event.clientY - tip.offsetHeight - 14)}px`;
    };
    column.addEventListener("pointerenter", show);
    column.addEventListener("pointermove", show);
    column.addEventListener("pointerdown", show);
  }
  const hide = () => {
    tip.hidden = true;
    if (shown) shown.classList.remove("shown");
    shown = null;
  };
  for (const chart of document.querySelectorAll(".chart")) {
    chart.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  }
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("pointerdown", (event) => event.target.closest(".column") || hide());

  for (const box of document.querySelectorAll("input[data-curve]")) {
    const lines = box.closest(".charts").querySelectorAll(`g[data-curve="${box.dataset.curve}"]`);
    const apply = () => lines.forEach((line) => line.classList.toggle("hidden", !box.checked));
    box.addEventListener("change", apply);
    apply();
  }

  for (const button of document.querySelectorAll("button[data-all]")) {
    button.addEventListener("click", () => {
      const boxes = [...button.parentElement.querySelectorAll("input")], some = boxes.some((box) => box.checked);
      for (const box of boxes) {
        box.checked = !some;
        box.dispatchEvent(new Event("change"));
      }
    });
  }

  for (const field of document.querySelectorAll("input[data-filter]")) {
    const rows = document.getElementById(field.dataset.filter).tBodies[0].rows;
    const apply = () => {
      const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => text.includes(word));
      }
    };
    field.addEventListener("input", apply);
    apply();
  }
}
