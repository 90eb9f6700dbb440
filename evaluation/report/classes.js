// The table of classes sorts; pairs get their pictures when they are opened.
function sortTable(table, column, head) {
  const down = head.getAttribute("aria-sort") === "ascending" || (head.getAttribute("aria-sort") === "none" && head.classList.contains("number") && column !== 1);
  for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.children[column].dataset.value;
  const compare = (a, b) => { const by = value(a) - value(b); return Number.isNaN(by) ? value(a).localeCompare(value(b)) : by; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
  table.tBodies[0].append(...rows);
}

function fillPair(details) {
  if (!details.open || details.dataset.filled) return;
  details.dataset.filled = "yes";
  const {a, b, telling} = report.pairs[details.dataset.pair];
  [[a, b], [b, a]].forEach(([label, other], side) => {
    // Counted above are pictures that chose nothing; of the others it is said how many there are.
    const taken = report.pictures.filter((one) => one.y === label && guess(one) === other);
    const mistakes = taken.filter((one) => one.split === report.judging), more = taken.length - mistakes.length;
    const some = [...mistakes.slice(0, 4), ...typical(label).slice(0, Math.max(2, 4 - mistakes.length))];
    details.querySelector(`.strip[data-side="${side}"]`).append(...some.map((picture, number) => tile(picture, number, some)));
    if (more) details.querySelector(`.more[data-side="${side}"]`).append(`and ${more} among pictures that are not counted here, marked`
      + " chose or test");
    if (!telling[side].length) return;
    details.querySelector(`.telling[data-side="${side}"]`).append(`Shows more in ${classes[label]}:`,
      element("ul", {}, ...telling[side].map(({concept, by}) => element("li", {}, conceptName(concept),
        element("small", {}, ` ${by.toFixed(1)}${writtenFor(report.concepts[concept].owners, label)}`)))));
  });
}

function startClasses() {
  const table = at("class-table");
  [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortTable(table, column, head)));
  for (const details of document.querySelectorAll(".pair")) {
    details.addEventListener("toggle", () => fillPair(details));
    fillPair(details);
  }
  document.addEventListener("click", (event) => {
    const {showClass, showPair, showConcepts} = event.target.closest("button")?.dataset ?? {};
    if (showClass !== undefined) goTo({class: showClass});
    if (showPair !== undefined) goTo({pair: showPair});
    if (showConcepts !== undefined) showConceptsOf(showConcepts);
  });
}
