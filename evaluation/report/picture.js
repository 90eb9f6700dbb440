// One picture: what the run says of it, what the encoder sees in it, and pictures of the two classes to compare.
const dialog = at("picture");
const opened = {list: [], number: 0, tab: 0, scores: false};

// Whom the answer is held against: the true class where it is wrong, else the second.
function rival(picture) { return isRight(picture) ? (picture.top[1] ?? picture.top[0])[0] : picture.y; }

function frame(picture, overlays, small = false) {
  return element("div", {class: small ? "frame small" : "frame"}, image(picture.id, caption(picture)), ...overlays);
}

function patchBox(patch, number) {
  return place(element("span", {class: `patch p${number + 1}`}, element("i", {}, number + 1)), patch.box);
}

function weighed(pairs) {
  return element("ul", {class: "plain weighed"}, ...pairs.filter(([, weight]) => weight >= 5).map(([concept, weight]) =>
    element("li", {}, element("span", {class: "weight"}, percent(weight)), element("span", {}, conceptName(concept)))));
}

function answers(picture) {
  return element("ul", {class: "plain answers"}, ...picture.top.map(([label, sure]) => element("li", {},
    element("span", {}, classes[label], label === picture.y ? element("b", {class: "right"}, " true class") : null),
    element("span", {class: "weight"}, percent(sure)), element("meter", {min: 0, max: 1000, value: sure, "aria-label": classes[label]}))));
}

// What may be promised of the answer: classes that hold the truth so often, and the taxon where the class is not sure.
function promised(picture) {
  const set = picture.set === null ? null : element("p", {class: "soft"}, `Classes that hold the truth in ${report.held} of 100 pictures: `,
    picture.set.map((label) => classes[label]).join(", "));
  const taxon = picture.taxon ? element("p", {class: "soft"}, `Not sure enough of the class; of the next rank it is: ${picture.taxon}`) : null;
  return [set, taxon].filter((note) => note !== null);
}

function runAnswers(picture) {
  return element("ul", {class: "plain runs"}, ...report.runs.map((run, number) => {
    const label = picture.guesses[number];
    return element("li", {}, `${run.name}: `, element("span", {class: label === picture.y ? "right" : "wrong"}, classes[label]));
  }));
}

function encoderTab(picture) {
  return {
    name: "What the encoder sees",
    overlays: picture.patches.map(patchBox),
    notes: [
      element("p", {class: "soft"}, `The densest selected patches, by the stage label_patches with ${report.runs[report.shown].encoder}: what`
        + " that encoder sees, not why a method decided. A weight is a concept's share among all concepts, in that patch."),
      ...picture.patches.map((patch, number) => element("div", {}, element("span", {class: `tag p${number + 1}`}, number + 1),
        ` ${patch.kind} `, element("span", {class: "weight"}, `density ${patch.density.toFixed(3)}`), weighed(patch.concepts))),
      picture.patches.length ? null : element("p", {}, "No patch of this picture was selected."),
    ],
  };
}

function speaks(picture) {
  if (!picture.speak) return [];
  const pair = [guess(picture), rival(picture)];
  if (!picture.speak.some((side) => side.length)) return [element("p", {class: "soft"}, "No concept of one of the two classes alone shows in this picture.")];
  return [element("h4", {}, "Concepts of one of the two alone that the picture shows"),
    element("p", {class: "soft"}, "By the highest share that a concept has in any patch: shares of several patches add up to no whole."),
    element("div", {class: "sides"}, ...pair.map((label, side) => element("div", {}, element("b", {}, classes[label]),
      picture.speak[side].length ? weighed(picture.speak[side]) : element("p", {class: "soft"}, "none"))))];
}

function compared(picture) {
  const pair = [guess(picture), rival(picture)];
  return [element("h4", {}, "Other pictures of the two"), element("div", {class: "sides"}, ...pair.map((label) => {
    const others = typical(label, picture.id).slice(0, 3);
    return element("div", {}, element("b", {}, classes[label]),
      element("div", {class: "strip"}, ...others.map((other, number) => tile(other, number, others))));
  }))];
}

// Pictures of a class that are recognised, the surest first.
function typical(label, without = null) {
  return report.pictures.filter((one) => one.y === label && isRight(one) && one.id !== without).sort((a, b) => b.top[0][1] - a.top[0][1]);
}

// What each patch adds to a run's answer against its rival: orange for the answer, blue against it; and each text, or pair.
function decisionTab(picture, {run, texts, pairs}) {
  const decision = picture.decisions[run], boxes = picture.boxes[report.runs[run].encoder], [a, b] = decision.pair.map((label) => classes[label]);
  const own = opened.scores && decision.scores !== null, values = (own ? decision.scores : decision.fall) ?? [];
  const most = Math.max(1e-9, ...values.map(Math.abs));
  const heat = values.map((value, node) => {
    const made = place(element("span", {class: "heat", title: value.toFixed(2)}), boxes[node]);
    made.style.background = value > 0 ? "#ff8c00" : "#2f7bff";
    made.style.opacity = 0.65 * Math.abs(value) / most;
    return made;
  });
  const moves = most >= (own ? 0.005 : report.least_move), name = report.runs[run].name, shown = report.runs[report.shown].name;
  const fall = moves ? `${a} against ${b}: how far the decision falls without a patch. Orange speaks for ${a}, blue for ${b}; strongest ${most.toFixed(2)} of a logit.`
    + " The whole picture and coarser patches stay, and they saw the patch too."
    : `${a} against ${b}: no patch moves this decision of ${name} by ${report.least_move} of a logit. It rests on the whole picture.`;
  const patches = own ? `How much ${name} itself says each patch counted, for whatever class; strongest ${most.toFixed(2)}.` : fall;
  const choice = (scores, text) => element("button", {type: "button", "aria-pressed": String(own === scores),
    onclick: () => { opened.scores = scores; drawPicture("[aria-pressed=true]"); }}, text);
  return {
    name,
    overlays: moves ? heat : [],
    notes: [
      decision.pair[0] === guess(picture) ? null : element("p", {}, `${name} answers ${a}, and not ${classes[guess(picture)]} as ${shown} does.`),
      decision.scores === null ? null : element("div", {class: "tabs"}, choice(false, "without the patch"), choice(true, "its own scores")),
      decision.fall === null ? null : element("p", {class: "soft"}, patches),
      decision.texts.length ? element("h4", {}, `${pairs ? "Pairs of texts" : "Texts"} by what they add for ${a} against ${b}`)
        : decision.fall === null ? element("p", {class: "soft"}, `${a} against ${b}: no text that ${name} reads moves this decision.`) : null,
      element("ul", {class: "plain weighed"}, ...decision.texts.map(([text, adds]) => element("li", {},
        element("span", {class: adds > 0 ? "weight for" : "weight against"}, (adds > 0 ? "+" : "") + adds.toFixed(2)), element("span", {}, texts[text].text,
          element("small", {}, writtenFor(texts[text].owners, decision.pair[adds > 0 ? 0 : 1])))))),
    ],
  };
}

// Why the run that is shown first has no tab of its own, where others have.
function noTab(picture) {
  if (!picture.decisions || report.explained.some((one) => one.run === report.shown)) return null;
  return element("p", {class: "soft"}, `${report.runs[report.shown].name} reads no patches one by one, and no concepts: there is nothing to show of why it`
    + ` answered ${classes[guess(picture)]}. The tabs are of other runs.`);
}

function tabsOf(picture) {
  return [...(picture.patches ? [encoderTab(picture)] : []),
    ...(picture.decisions ? report.explained.map((one) => decisionTab(picture, one)) : [])];
}

function drawPicture(focus = ".next") {
  const picture = opened.list[opened.number], tabs = tabsOf(picture);
  const tab = tabs[Math.min(opened.tab, tabs.length - 1)] ?? {overlays: [], notes: []};
  const step = (by, text, name) => element("button", {type: "button", class: name, disabled: !opened.list[opened.number + by], onclick: () => stepPicture(by)}, text);
  const chooser = tabs.length < 2 ? null : element("div", {class: "tabs", role: "tablist"}, ...tabs.map((one, number) => element("button",
    {type: "button", role: "tab", "aria-selected": String(one === tab), onclick: () => { opened.tab = number; drawPicture("[aria-selected=true]"); }}, one.name)));
  dialog.replaceChildren(
    element("div", {class: "bar"}, element("h3", {id: "picture-title"}, classes[picture.y], " ",
      element("span", {class: isRight(picture) ? "right" : "wrong"}, isRight(picture) ? "recognised" : `taken for ${classes[guess(picture)]}`), " ", splitMark(picture)),
      element("div", {}, step(-1, "Previous", "previous"), step(1, "Next", "next"),
        element("button", {type: "button", class: "close", onclick: () => dialog.close()}, "Close"))),
    element("div", {class: "columns"},
      element("div", {class: "seen"}, frame(picture, tab.overlays), chooser, noTab(picture)),
      element("div", {class: "notes"}, ...tab.notes.filter((note) => note !== null)),
      element("div", {class: "said"}, element("h4", {}, `What ${report.runs[report.shown].name} says`), answers(picture), ...promised(picture),
        element("h4", {}, "What every run says"), runAnswers(picture), ...speaks(picture), ...compared(picture),
        element("p", {class: "soft"}, element("code", {}, picture.path), picture.group === null ? "" : `, group ${picture.group}`))));
  const wanted = dialog.querySelector(focus);
  (wanted && !wanted.disabled ? wanted : dialog.querySelector(".close")).focus({preventScroll: true});
}

function openPicture(list, number) {
  Object.assign(opened, {list, number});
  drawPicture();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  keepAddress(list[number].id);
}

function stepPicture(by) {
  if (!opened.list[opened.number + by]) return;
  opened.number += by;
  drawPicture(by > 0 ? ".next" : ".previous");
  keepAddress(opened.list[opened.number].id);
}

function startPicture() {
  dialog.addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by && event.target.getAttribute("role") !== "tab") { event.preventDefault(); stepPicture(by); }
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    keepAddress();
    document.querySelector(`#tiles [data-picture="${opened.list[opened.number].id}"]`)?.focus();
  });
}
