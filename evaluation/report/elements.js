// What all parts of the page share: the data, and elements made of plain text (never of markup).
const report = JSON.parse(document.getElementById("report-data").textContent);
const held = document.getElementById("report-pictures");
const inside = JSON.parse(held.textContent);
const classes = report.classes.map((one) => one.name);
const byId = new Map(report.pictures.map((picture) => [picture.id, picture]));

function at(id) { return document.getElementById(id); }

// element("li", {class: "x", onclick: f}, "text", child): a child that is no element becomes text; null is left out.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function percent(thousandths) {
  return thousandths > 990 ? "> 99 %" : thousandths < 10 ? "< 1 %" : `${Math.round(thousandths / 10)} %`;
}

// Whose text it is, where it stands for another class.
function writtenFor(owners, label) {
  const names = owners.slice(0, 3).map((one) => classes[one]).join(", "), more = owners.length - 3;
  return owners.includes(label) || !owners.length ? "" : ` (written for ${names}${more > 0 ? ` and ${more} more` : ""})`;
}

function counted(number, one, many) { return `${number} ${number === 1 ? one : many}`; }

function source(id) {
  return id in inside ? `data:image/webp;base64,${inside[id]}` : `${held.dataset.folder}/${id}.webp`;
}

function image(id, alt) { return element("img", {src: source(id), alt, decoding: "async"}); }

function place(made, box) {
  const [left, top, right, bottom] = box.map((side) => side / 10);
  Object.assign(made.style, {left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`});
  return made;
}

function option(value, text) { return element("option", {value}, text); }

// Classes in the order of the page: those of one superclass together.
function classOptions() { return report.order.map((label) => option(label, classes[label])); }

// A list that is shown a page at a time; `draw` makes the elements of some rows.
class Pages {
  constructor(list, bar, size, draw) { Object.assign(this, {list, bar, size, draw, rows: [], page: 0}); }

  show(rows, page = 0) {
    this.rows = rows;
    this.last = Math.max(0, Math.ceil(rows.length / this.size) - 1);
    this.turn(page);
  }

  turn(page) {
    this.page = Math.min(Math.max(page, 0), this.last);
    const start = this.page * this.size;
    const some = this.rows.slice(start, start + this.size);
    this.list.replaceChildren(...some.map((row, place) => this.draw(row, start + place)));
    const step = (by, text) => element("button", {type: "button", disabled: this.page + by < 0 || this.page + by > this.last,
      onclick: () => { this.turn(this.page + by); this.onturn?.(); this.bar.querySelector("button:not(:disabled)")?.focus(); }}, text);
    const range = `${start + 1} to ${start + some.length} of ${this.rows.length}`;
    this.bar.replaceChildren(...(this.last ? [step(-1, "Previous"), range, step(1, "Next")] : []));
  }
}
