// The concept bank, and lines for concepts.edits without the texts that were ticked.
const dropped = new Set(), edited = new Set();
const conceptFilters = at("concept-filters");

function ownerNames(concept) { return concept.owners.map((label) => classes[label]).join(", ") || "no class"; }

// A prototype has no text and is named after its classes.
function conceptName(number) {
  const concept = report.concepts[number];
  return concept.text ?? `prototype of ${ownerNames(concept)}`;
}

function low(value) { return value === null ? Infinity : value; }

const CONCEPT_ORDERS = {
  useless: (a, b) => low(a.finds) - low(b.finds),
  useful: (a, b) => (b.finds ?? -1) - (a.finds ?? -1),
  nats: (a, b) => (b.nats ?? -1) - (a.nats ?? -1),
  class: (a, b) => ownerNames(a).localeCompare(ownerNames(b)),
};

function conceptRow(number) {
  const concept = report.concepts[number];
  const patches = concept.patches.map(([id, box]) => {
    const picture = byId.get(id), own = concept.owners.includes(picture.y);
    return element("figure", {}, frame(picture, [place(element("span", {class: "patch p1"}), box)], true),
      element("figcaption", {class: own ? "right" : "wrong"}, classes[picture.y]));
  });
  const found = concept.finds === null ? null
    : element("div", {}, "finds ", element("b", {class: concept.finds <= report.chance ? "wrong" : "right"}, `${(100 * concept.finds).toFixed(0)} %`));
  const nats = concept.nats === null ? null : element("div", {class: "soft"}, `${concept.nats.toFixed(2)} nats`);
  return element("li", {class: "concept"},
    element("div", {}, element("b", {}, conceptName(number)), element("div", {class: "of"}, `${ownerNames(concept)}; ${concept.kind}`,
      concept.kept ? "" : element("span", {class: "wrong"}, `; dropped: ${concept.reason ?? "no reason given"}`))),
    concept.kept ? element("div", {class: "numbers"}, found ?? "", nats) : null,
    patches.length ? element("div", {class: "strip"}, ...patches) : null,
    concept.text === null || !concept.owners.length ? null : acts(concept));
}

function acts(concept) {
  const tick = element("input", {type: "checkbox", checked: dropped.has(concept.text), onchange: () => {
    tick.checked ? dropped.add(concept.text) : dropped.delete(concept.text);
    showEdits();
  }});
  const ids = concept.owners.map((label) => report.classes[label].id);
  return element("div", {class: "acts"}, element("label", {}, tick, " leave out"),
    element("button", {type: "button", class: "link", onclick: () => { ids.forEach((id) => edited.add(id)); showEdits(); }}, "lines to edit"));
}

let conceptPages = null;

function showConcepts() {
  const wanted = Object.fromEntries(["class", "kept", "order", "words"].map((name) => [name, conceptFilters.elements[name].value]));
  const words = wanted.words.toLowerCase().split(/\s+/).filter((word) => word);
  const rows = [...report.concepts.keys()].filter((number) => {
    const concept = report.concepts[number], text = (concept.text ?? "").toLowerCase();
    return concept.kind !== "name" && (!wanted.class || concept.owners.includes(+wanted.class)) &&
      (!wanted.kept || concept.kept === (wanted.kept === "kept")) && words.every((word) => text.includes(word));
  }).sort((a, b) => CONCEPT_ORDERS[wanted.order](report.concepts[a], report.concepts[b]));
  at("concepts-found").textContent = rows.length ? counted(rows.length, "concept", "concepts") : "No concept is like that.";
  conceptPages.show(rows);
}

function showConceptsOf(label) {
  conceptFilters.elements.class.value = label;
  showConcepts();
  at("concepts").scrollIntoView();
}

// All texts of each class that is to be edited, less those left out: a class in concepts.edits is taken as it stands there.
function showEdits() {
  const lines = {};
  for (const [id, texts] of Object.entries(report.written)) {
    if (edited.has(id) || texts.some((text) => dropped.has(text))) lines[id] = texts.filter((text) => !dropped.has(text));
  }
  at("edits").hidden = !Object.keys(lines).length;
  at("edit-lines").value = JSON.stringify(lines, null, 2);
  at("copied").textContent = "";
}

async function copyLines() {
  at("edit-lines").select();
  try { await navigator.clipboard.writeText(at("edit-lines").value); at("copied").textContent = "copied"; }
  catch { at("copied").textContent = "selected: copy with Ctrl+C"; }
}

function startConcepts() {
  if (!conceptFilters) return;
  conceptPages = new Pages(at("bank"), at("concept-pages"), 12, conceptRow);
  conceptPages.onturn = () => at("concepts-found").scrollIntoView();
  conceptFilters.elements.class.append(...classOptions());
  conceptFilters.addEventListener("input", showConcepts);
  conceptFilters.addEventListener("submit", (event) => event.preventDefault());
  at("copy-lines").addEventListener("click", copyLines);
  at("drop-lines").addEventListener("click", () => { dropped.clear(); edited.clear(); showEdits(); conceptPages.turn(conceptPages.page); });
  showConcepts();
}
