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
  window.addEventListener("beforeprint", () => {
    for (const hidden of document.querySelectorAll("details")) hidden.open = true;
  });
})();
