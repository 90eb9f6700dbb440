// The gallery: which pictures are shown. The address keeps the filter: #pictures?class=3&answer=wrong
const filters = at("filters");
const FIELDS = ["class", "taken", "pair", "answer", "sure", "split", "group", "order"];

function guess(picture) { return picture.top[0][0]; }
function isRight(picture) { return guess(picture) === picture.y; }

function caption(picture) {
  const name = classes[picture.y], taken = classes[guess(picture)];
  return isRight(picture) ? `${name}, recognised` : `${name}, taken for ${taken}`;
}

function splitMark(picture) {
  const text = {choose: "chose", test: "test"}[picture.split];
  return text ? element("b", {class: "mark"}, text) : null;
}

function tile(picture, number, list) {
  const right = isRight(picture);
  return element("button", {type: "button", class: `tile ${right ? "hit" : "miss"}`, "data-picture": picture.id, "aria-label": caption(picture),
    onclick: () => openPicture(list, number)},
    image(picture.id, ""), element("b", {}, classes[picture.y]),
    right ? null : element("span", {class: "wrong"}, `taken for ${classes[guess(picture)]}`),
    element("span", {}, `${percent(picture.top[0][1])} sure `, splitMark(picture)));
}

const tiles = new Pages(at("tiles"), at("pages"), 48, (picture, number) => element("li", {}, tile(picture, number, tiles.rows)));
tiles.onturn = () => { keepAddress(); at("found").scrollIntoView(); };

function readFilters() { return Object.fromEntries(FIELDS.map((name) => [name, filters.elements[name].value])); }

const rank = Object.fromEntries(report.order.map((label, place) => [label, place]));
const ORDERS = {
  "": (a, b) => isRight(a) - isRight(b) || (isRight(a) ? a.top[0][1] - b.top[0][1] : b.top[0][1] - a.top[0][1]),
  unsure: (a, b) => a.top[0][1] - b.top[0][1],
  class: (a, b) => rank[a.y] - rank[b.y] || isRight(a) - isRight(b),
};

function found(wanted) {
  const [low, high] = wanted.sure.split("-").map((value) => value * 10);
  const pair = wanted.pair ? wanted.pair.split(",").map(Number) : null;
  return report.pictures.filter((picture) =>
    (!wanted.class || picture.y === +wanted.class) &&
    (!wanted.taken || guess(picture) === +wanted.taken) &&
    (!pair || (pair.includes(picture.y) && pair.includes(guess(picture)))) &&
    (!wanted.answer || isRight(picture) === (wanted.answer === "right")) &&
    (!wanted.sure || (picture.top[0][1] >= low && picture.top[0][1] < high)) &&
    (!wanted.split || picture.split === wanted.split) &&
    (!wanted.group || picture.group === wanted.group)).sort(ORDERS[wanted.order]);
}

function showFound(page = 0) {
  const rows = found(readFilters());
  const wrong = rows.filter((picture) => !isRight(picture)).length;
  at("found").textContent = rows.length ? `${counted(rows.length, "picture", "pictures")}, ${wrong} wrong`
    : "No picture is like that. Show all takes the filters away.";
  tiles.show(rows, page);
  tabTo(0);
}

function keepAddress(picture = null) {
  const set = Object.entries(readFilters()).filter(([, value]) => value);
  if (tiles.page) set.push(["page", tiles.page]);
  if (picture) set.push(["picture", picture]);
  const kept = new URLSearchParams(set).toString();
  history.replaceState(null, "", kept ? `#pictures?${kept}` : "#pictures");
}

function setFilters(wanted) {
  if (wanted.pair) addPair(wanted.pair);
  for (const name of FIELDS) filters.elements[name].value = wanted[name] ?? "";
  for (const select of filters.querySelectorAll("select")) if (select.selectedIndex < 0) select.value = "";
  showFound(Number(wanted.page) || 0);
}

function addPair(value) {
  const [a, b] = value.split(",").map(Number);
  const select = filters.elements.pair;
  if (!(a in classes && b in classes) || [...select.options].some((one) => one.value === value)) return;
  select.append(option(value, `${classes[a]} and ${classes[b]}`));
}

function goTo(wanted) {
  setFilters(wanted);
  keepAddress();
  at("pictures").scrollIntoView();
  at("tiles").querySelector("button")?.focus({preventScroll: true});
}

function readAddress() {
  if (!location.hash.startsWith("#pictures?")) return;
  const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice("#pictures?".length)));
  setFilters(wanted);
  at("pictures").scrollIntoView();
  const number = tiles.rows.findIndex((picture) => picture.id === wanted.picture);
  if (number >= 0) openPicture(tiles.rows, number);
}

// One stop of the Tab key for all tiles; arrow keys move between them, over the ends of a page too.
function tabTo(place) {
  const buttons = [...at("tiles").querySelectorAll("button")];
  buttons.forEach((button, number) => { button.tabIndex = number === place ? 0 : -1; });
  return buttons[place];
}

function moveTile(event) {
  const buttons = [...at("tiles").querySelectorAll("button")], now = buttons.indexOf(document.activeElement);
  if (now < 0) return;
  const across = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -now, End: buttons.length - 1 - now}[event.key];
  if (step === undefined) return;
  event.preventDefault();
  let next = now + step;
  if (next < 0 && tiles.page > 0) { tiles.turn(tiles.page - 1); next = tiles.size - 1; keepAddress(); }
  else if (next >= buttons.length && tiles.page < tiles.last) { tiles.turn(tiles.page + 1); next = 0; keepAddress(); }
  tabTo(Math.min(Math.max(next, 0), at("tiles").children.length - 1)).focus();
}

function startGallery() {
  filters.elements.class.append(...classOptions());
  filters.elements.taken.append(...classOptions());
  report.pairs.forEach(({a, b}) => addPair(`${a},${b}`));
  const groups = [...new Set(report.pictures.map((picture) => picture.group))].filter((group) => group !== null).sort();
  filters.elements.group.append(...groups.map((group) => option(group, group)));
  filters.querySelector(".group").hidden = !groups.length;
  filters.addEventListener("input", () => { showFound(); keepAddress(); });
  filters.addEventListener("reset", (event) => { event.preventDefault(); setFilters({}); keepAddress(); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  at("tiles").addEventListener("keydown", moveTile);
  at("tiles").addEventListener("focusin", (event) => tabTo([...at("tiles").querySelectorAll("button")].indexOf(event.target)));
  addEventListener("hashchange", readAddress);
  showFound();
  readAddress();
}
