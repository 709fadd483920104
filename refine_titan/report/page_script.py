"""The script of a page. It makes text from what a page holds, never markup: `textContent` only."""

SCRIPT = """
"use strict";

// Answers of an evaluation: shows those of one task and kind. A browser without scripts shows all answers.
for (const box of document.querySelectorAll("[data-filter]")) {
  const [task, kind] = box.querySelectorAll("select"), count = box.querySelector("output");
  const show = () => {
    let shown = 0;
    for (const card of box.querySelectorAll("article")) {
      const fits = (!task.value || card.dataset.task === task.value) && (!kind.value || card.dataset.kind === kind.value);
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + " shown";
  };
  task.selectedIndex = Math.min(1, task.options.length - 1);
  task.onchange = kind.onchange = show;
  box.querySelector(".controls").hidden = false;
  show();
}

// Rollouts of a training run: a page of cards at a time, made from rows of JSON (rollout_browser.py).
for (const box of document.querySelectorAll("[data-rollouts]")) {
  const PAGE = 20;
  const { fields, rows, documents } = JSON.parse(box.querySelector("script").textContent), data = {}, total = rows.length;
  fields.forEach((name, place) => { data[name] = rows.map(row => row[place]); });
  const field = name => box.querySelector(`[name="${name}"]`), value = name => field(name) ? field(name).value : "";
  const list = box.querySelector(".cards"), count = box.querySelector("output"), place = box.querySelector(".place");
  const names = documents.map(name => name.toLowerCase());
  let found = [], page = 0, texts = null;

  const element = (tag, text = "", kind = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const signs = text => text.replaceAll(" ", "\\u00b7").replaceAll("\\n", "\\u21b5").replaceAll("\\t", "\\u21e5");
  // Shows whitespace at either end, which a rollout of a few tokens may consist of.
  const ends = text => {
    const [, before, core, after] = /^([ \\n]*)([^]*?)([ \\n]*)$/.exec(text);
    const show = part => part.replaceAll(" ", "\\u00b7").replaceAll("\\n", "\\u21b5\\n");
    return show(before) + core + show(after);
  };
  const number = value => value === null ? "\\u2013" : value.toFixed(3);

  const row = (name, tokens, texts, others) => {
    const made = element("tr");
    const head = element("th", name);
    head.scope = "row";
    made.append(head);
    tokens.forEach((token, i) => {
      const text = texts.length === tokens.length ? texts[i] : "";
      const cell = element("td", text ? signs(text) : "#" + token, text ? "" : "id");
      cell.title = "token " + token;
      if (others.length && token !== others[i]) cell.classList.add("differs");
      made.append(cell);
    });
    return made;
  };
  const tokens = i => {
    const box = element("div", "", "scroll tokens"), table = element("table");
    const [sampled, truth] = data.tokens[i], [pieces, truePieces] = data.pieces[i];
    table.append(row("sampled", sampled, pieces, truth), row("true", truth, truePieces, sampled));
    box.tabIndex = 0;
    box.append(table);
    return box;
  };
  const card = i => {
    const made = element("article"), head = element("header"), pair = element("div", "", "pair");
    const [matches, compared] = data.match[i];
    head.append(element("b", documents[data.document[i]]), element("span", "step " + data.step[i].toLocaleString("en")));
    head.append(element("span", "token " + data.position[i].toLocaleString("en")), element("span", "reward " + number(data.reward[i])));
    head.append(element("span", "advantage " + number(data.advantage[i])));
    if (compared) head.append(element("span", `${matches} of ${compared} tokens match`));
    const parts = [["prefix's end", data.prefix[i]]];
    if (!compared) parts.push(["sampled", data.sampled[i]], [data.outer[i] ? "right answers" : "true", data.truth[i]]);
    for (const [name, text] of parts) pair.append(element("span", name), element("pre", ends(text)));
    made.append(head, pair);
    if (compared) made.append(tokens(i));
    return made;
  };

  const show = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    place.textContent = `page ${(page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    for (const name of ["first", "back"]) field(name).disabled = page === 0;
    for (const name of ["next", "last"]) field(name).disabled = page === pages - 1;
  };
  const limit = (name, otherwise) => value(name) === "" ? otherwise : Number(value(name));
  const filter = () => {
    const [low, high] = [limit("from-step", -Infinity), limit("to-step", Infinity)];
    const [least, most] = [limit("from-reward", -Infinity), limit("to-reward", Infinity)];
    const anyReward = least === -Infinity && most === Infinity, match = value("match"), kind = value("kind");
    const part = value("document").toLowerCase(), text = value("text").toLowerCase();
    if (text && !texts) texts = data.prefix.map((prefix, i) => [prefix, data.sampled[i], data.truth[i]].join("\\n").toLowerCase());
    const wanted = new Set();
    names.forEach((name, i) => { if (name.includes(part)) wanted.add(i); });
    found = [];
    let rewards = 0, rewarded = 0, matching = 0, compared = 0;
    for (let i = 0; i < total; i++) {
      const reward = data.reward[i], [matches, tokens] = data.match[i];
      if (data.step[i] < low || data.step[i] > high || !wanted.has(data.document[i])) continue;
      if (!anyReward && !(reward !== null && reward >= least && reward <= most)) continue;
      if (match && !(tokens && (match === "all" ? matches === tokens : match === "none" ? matches === 0 : matches > 0 && matches < tokens)))
        continue;
      if (kind && (kind === "answers") !== data.outer[i]) continue;
      if (text && !texts[i].includes(text)) continue;
      found.push(i);
      if (reward !== null) { rewards += reward; rewarded++; }
      matching += matches;
      compared += tokens;
    }
    const [by, sign] = { step: ["step", 1], last: ["step", -1], high: ["reward", -1], low: ["reward", 1] }[value("order")];
    const key = i => data[by][i] === null ? Infinity * sign : data[by][i];
    found.sort((a, b) => sign * (key(a) - key(b)) || a - b);
    const facts = [`${found.length.toLocaleString("en")} of ${total.toLocaleString("en")}`];
    if (rewarded) facts.push("mean reward " + number(rewards / rewarded));
    if (compared) facts.push(`${(100 * matching / compared).toFixed(1)} % of tokens match`);
    count.textContent = facts.join("; ");
    page = 0;
    show();
  };
  for (const control of box.querySelectorAll("input, select")) control.addEventListener("input", filter);
  const turn = { first: () => 0, back: () => page - 1, next: () => page + 1, last: () => Infinity };
  for (const [name, to] of Object.entries(turn)) field(name).onclick = () => { page = to(); show(); };
  for (const controls of box.querySelectorAll(".controls")) controls.hidden = false;
  filter();
}
"""
