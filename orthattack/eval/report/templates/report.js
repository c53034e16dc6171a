"use strict";
// Everything a user named is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Light and dark -------------------------------------------------------------------------------------------------
const root = document.documentElement;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
function theme(name) {
  if (name) root.dataset.theme = name;
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
}
let stored = null;
try { stored = localStorage.getItem("orthattack-theme"); } catch { /* a file may have no storage */ }
theme(stored);
$("theme").addEventListener("click", () => {
  const name = isDark() ? "light" : "dark";
  theme(name);
  try { localStorage.setItem("orthattack-theme", name); } catch { /* then it lasts until the page is closed */ }
});

// Model and radius of everything above the gallery ---------------------------------------------------------------
function choose() {
  const model = $("model").value, eps = $("eps").value;
  const fits = (e) => (model === "" || e.dataset.m === undefined || e.dataset.m === model)
    && (eps === "" || e.dataset.e === undefined || e.dataset.e === eps);
  for (const element of all("[data-m], [data-e]")) element.hidden = !fits(element);
  for (const table of all("table[id]")) {
    const count = $(`${table.id}-count`);
    if (count) count.textContent = `${all("tbody tr:not([hidden])", table).length} of ${all("tbody tr", table).length} rows`;
  }
  classes();
}
$("model").addEventListener("change", choose);
$("eps").addEventListener("change", choose);

// Tables that sort; what is undefined stays last -----------------------------------------------------------------
for (const button of all("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const first = head.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const th of head.parentNode.children) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const value = (row) => row.children[column].dataset.v ?? row.children[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = head.dataset.text === undefined ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return order === "ascending" ? difference : -difference;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

// The legend switches series off and on, and shows one among many -------------------------------------------------
const off = new Set();
for (const button of all(".legend button")) {
  const series = `.series-${button.dataset.series}`;
  const paint = (hovered) => {
    for (const group of all('.figures [class^="series-"]')) {
      const own = group.matches(series);
      group.style.opacity = hovered && !own ? ".12" : "";
    }
  };
  button.addEventListener("click", () => {
    if (!off.delete(series)) off.add(series);
    for (const twin of all(`.legend [data-series="${button.dataset.series}"]`)) {
      twin.setAttribute("aria-pressed", String(!off.has(series)));
    }
    for (const group of all(`.figures ${series}`)) group.style.display = off.has(series) ? "none" : "";
    paint(false);
  });
  button.addEventListener("mouseenter", () => paint(!off.has(series)));
  button.addEventListener("mouseleave", () => paint(false));
}

// Per class: all of few classes; of many the worst and the best, the others on demand ------------------------------
const FEW = 24, ENDS = 10;
function classes() {
  const box = $("classes"), opened = new Set(all("details[open]", box).map((d) => d.dataset.key));
  box.replaceChildren();
  data.classes.forEach((model, m) => model.cells.forEach((cells, e) => {
    if (($("model").value !== "" && +$("model").value !== m) || ($("eps").value !== "" && +$("eps").value !== e)) return;
    box.append(make("h3", { textContent: `${data.models[m]}, ε = ${data.radii[e]}` }));
    if (!model.names.length || !cells.length) {
      box.append(make("p", { className: "empty", textContent: "No image has been scored." }));
      return;
    }
    const worst = cells[cells.length - 1];
    const share = ([robust, scored]) => (scored ? robust / scored : NaN);
    const order = model.names.map((_, i) => i).filter((i) => worst[i][1])
      .sort((a, b) => share(worst[a]) - share(worst[b]) || model.names[a].localeCompare(model.names[b]));
    if (order.length <= FEW) {
      box.append(classTable(model, cells, order));
      return;
    }
    box.append(make("p", { className: "note", textContent: `The ${ENDS} classes with the lowest robust accuracy:` }),
      classTable(model, cells, order.slice(0, ENDS)),
      make("p", { className: "note", textContent: `The ${ENDS} with the highest:` }),
      classTable(model, cells, order.slice(-ENDS)));
    const more = make("details", {}, make("summary", { textContent: `All ${order.length} classes` }));
    more.dataset.key = `${m} ${e}`;
    more.addEventListener("toggle", () => {
      if (more.open && more.children.length === 1) more.append(classTable(model, cells, order));
    });
    more.open = opened.has(more.dataset.key);
    box.append(more);
  }));
}

function classTable(model, cells, order) {
  const names = [...data.attacks, data.worst];
  const head = make("tr", {}, make("th", { className: "first", scope: "col", textContent: "class" }),
    ...names.map((name) => make("th", { className: "column", scope: "col" }, make("span", { textContent: name }))));
  const rows = order.map((i) => make("tr", {}, make("th", { className: "first", scope: "row", textContent: model.names[i] }),
    ...cells.map((column) => {
      const [robust, scored] = column[i];
      if (!scored) return make("td", { textContent: "–" });
      const cell = make("td", { className: "heat" }, `${(100 * robust / scored).toFixed(0)} %`,
        make("small", { textContent: `${robust}/${scored}` }));
      cell.style.setProperty("--share", robust / scored);
      return cell;
    })));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  return make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "robust accuracy per class" }, table);
}

// Gallery: a card per model, radius and image for the attacks that belong together ---------------------------------
const PAGE = 12;
const [MODEL, ATTACK, EPS, CLASS, CLEAN, ADVERSARIAL, FOOLED, NORM, COSINE, TIMES, NAME, IMAGE, CHANGED, DELTA] = Array(14).keys();
let limit = PAGE;

const groups = new Map();
for (const c of data.cards) {
  const key = [c[MODEL], c[EPS], c[IMAGE], data.families[c[ATTACK]]].join();
  groups.set(key, [...(groups.get(key) || []), c]);
}
for (const group of groups.values()) group.sort((a, b) => a[ATTACK] - b[ATTACK]);

function options(id, column, text) {
  const values = [...new Set(data.cards.map((card) => card[column]))];
  if (column === CLASS) values.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  else values.sort((a, b) => a - b);
  for (const value of values) $(id).append(make("option", { value: String(value), textContent: text(value) }));
}

function picture(number, alt) {
  const image = make("img", { src: data.images[number], alt, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("large", image.naturalWidth > 64));
  return image;
}

const radius = (c) => (c[EPS] < 0 ? "minimal" : `ε = ${data.radii[c[EPS]]}`);
const [YES, NO] = data.targeted ? ["target reached", "target not reached"] : ["fooled", "not fooled"];
const verdict = (c) => (c[FOOLED] ? YES : c[CLEAN] === c[CLASS] ? NO : "initially misclassified");

// All pictures of a group: what each is called, what is said of it, and its number.
const pictures = (group) => [
  { title: "clean", text: group[0][CLEAN], number: group[0][IMAGE] },
  ...group.flatMap((c) => [
    { title: `${data.attacks[c[ATTACK]]}: δ × ${c[TIMES]}`, text: `norm ${c[NORM]}, cos ${c[COSINE]}`, number: c[DELTA] },
    { title: `${data.attacks[c[ATTACK]]}: adversarial`, text: `${c[ADVERSARIAL]}, ${verdict(c)}`, number: c[CHANGED] },
  ]),
];

function card(group) {
  const c = group[0], views = pictures(group), sides = $("view-side").checked;
  const button = (at, caption) => {
    const open = make("button", { type: "button", className: "picture", title: "enlarge" },
      picture(views[at].number, `${views[at].title}, ${c[NAME]}`));
    open.addEventListener("click", () => enlarge(group, at));
    return make("figure", {}, open, make("figcaption", { textContent: caption }));
  };
  const told = (own) => [
    make("p", {}, sides ? "→ " : `${own[CLEAN]} → `, make("b", { className: own[FOOLED] ? "fooled" : "held", textContent: own[ADVERSARIAL] }),
      own[FOOLED] ? "" : `, ${verdict(own)}`),
    make("p", {}, make("small", { textContent: `norm ${own[NORM]}, cos ${own[COSINE]}` }))];
  const columns = group.map((own, k) => make("div", { className: "attack" },
    make("h4", { textContent: data.attacks[own[ATTACK]] }),
    ...(sides ? [button(1 + 2 * k, `δ × ${own[TIMES]}`), button(2 + 2 * k, "adversarial")] : [slider(own)]),
    ...told(own)));
  const clean = make("div", { className: "clean" }, make("h4", { textContent: c[CLASS] }), button(0, "clean"),
    make("p", {}, c[CLEAN] === c[CLASS] ? "" : `initially ${c[CLEAN]}`));
  return make("article", { className: "card" },
    make("h3", { textContent: `${data.models[c[MODEL]]}, ${radius(c)}` }),
    make("p", {}, make("small", { textContent: c[NAME] })),
    grid(sides ? [clean, ...columns] : columns));
}

function grid(columns) {
  const views = make("div", { className: "views" }, ...columns);
  views.style.setProperty("--columns", Math.min(Math.max(columns.length, 2), 4));
  views.style.setProperty("--narrow", Math.min(Math.max(columns.length, 2), 3));
  return views;
}

function slider(c) {
  const stack = make("div", { className: "stack" }, picture(c[IMAGE], `clean, ${c[NAME]}`),
    picture(c[CHANGED], `adversarial, ${c[NAME]}`));
  const input = make("input", { type: "range", min: "0", max: "100", value: "50",
    ariaLabel: "how much of the clean image is shown" });
  input.addEventListener("input", () => stack.style.setProperty("--cut", `${input.value}%`));
  return make("div", { className: "slider" }, stack, input,
    make("div", { className: "ends" }, make("span", { textContent: "clean" }), make("span", { textContent: "adversarial" })));
}

// One picture as large as the window; the others of its image take its place, so that differences are seen.
let turn = () => {};
function enlarge(group, at) {
  const views = pictures(group);
  turn = (by) => {
    at = (at + by + views.length) % views.length;
    $("large-title").textContent = views[at].title;
    $("large-text").textContent = views[at].text;
    $("large-picture").replaceChildren(picture(views[at].number, `${views[at].title}, ${group[0][NAME]}`));
  };
  turn(0);
  $("large").showModal();
}

function gallery(keep) {
  if (!keep) limit = PAGE;
  const wanted = [["g-model", MODEL], ["g-attack", ATTACK], ["g-eps", EPS], ["g-class", CLASS], ["g-fooled", FOOLED]]
    .map(([id, column]) => [column, $(id).value]).filter(([, value]) => value !== "");
  const mixed = $("g-fooled").value === "2";
  const fits = (c) => wanted.every(([column, value]) => (column === FOOLED && mixed) || String(c[column]) === value);
  const found = [...groups.values()].filter((group) => group.some(fits)
    && (!mixed || new Set(group.map((c) => c[FOOLED])).size > 1));
  const shown = found.slice(0, limit);
  $("cards").className = $("view-side").checked ? "cards" : "cards slide";
  $("cards").replaceChildren(...shown.map(card));
  $("g-count").textContent = found.length ? `${shown.length} of ${found.length} shown` : "nothing matches";
  $("g-none").hidden = found.length > 0;
  $("g-more").hidden = shown.length === found.length;
}

if (data.cards.length) {
  options("g-model", MODEL, (v) => data.models[v]);
  options("g-attack", ATTACK, (v) => data.attacks[v]);
  options("g-eps", EPS, (v) => (v < 0 ? "minimal" : data.radii[v]));
  options("g-class", CLASS, (v) => v);
  for (const control of all("#gallery-controls select, #gallery-controls input")) {
    control.addEventListener("change", () => gallery(false));
  }
  $("large-close").addEventListener("click", () => $("large").close());
  $("large-before").addEventListener("click", () => turn(-1));
  $("large-after").addEventListener("click", () => turn(1));
  $("large").addEventListener("keydown", (event) => turn({ ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0));
  $("g-more").addEventListener("click", () => { limit += PAGE; gallery(true); });
  $("g-reset").addEventListener("click", () => {
    for (const select of all("#gallery-controls select")) select.value = "";
    gallery(false);
  });
  gallery(false);
}
choose();
addEventListener("beforeprint", () => all("details.print").forEach((d) => { d.open = true; }));
