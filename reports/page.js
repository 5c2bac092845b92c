"use strict";
(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.style.display = "none"; };
  const show = (event) => {
    const mark = event.target.closest("[data-tip]");
    if (!mark) { hide(); return; }
    tip.textContent = mark.dataset.tip;
    tip.style.display = "block";
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(event.pageX + 12, window.scrollX + room))}px`;
    tip.style.top = `${event.pageY + 14}px`;
  };
  document.addEventListener("mousemove", show);
  document.addEventListener("click", show);

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const before = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("th button");
    if (!button) return;
    const head = button.parentElement;
    const table = head.closest("table");
    const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => turn * before(key(a, head.cellIndex), key(b, head.cellIndex)));
    body.append(...rows);
  });

  // A long table gets a field: only rows that hold all of its words stay.
  const LONG = 8;
  for (const box of document.querySelectorAll(".scroll")) {
    const rows = [...box.querySelectorAll("tbody tr")];
    if (rows.length <= LONG || box.closest(".budgets")) continue;
    const field = Object.assign(document.createElement("input"), { type: "search", placeholder: `filter ${rows.length} rows`, className: "filter" });
    field.setAttribute("aria-label", "filter the rows of this table");
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => text.includes(word));
      }
    });
    box.before(field);
  }

  const fronts = document.getElementById("fronts");
  fronts?.addEventListener("change", () => {
    document.querySelectorAll(".front").forEach((front, number) => { front.hidden = number !== Number(fronts.value); });
  });

  const unfold = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", unfold);
  document.addEventListener("click", (event) => { if (event.target.closest("nav a")?.hash === location.hash) unfold(); });
  unfold();
  window.addEventListener("beforeprint", () => {
    for (const hidden of document.querySelectorAll("details:not(#explore)")) hidden.open = true;
  });
})();
