// What a picture says under the pointer. Without this script the page is complete.
// Beside every picture that answers lies its data as JSON (gradflow/reporter/readout.py): panels, each a
// grid of cells or curves, and the place of each panel on the picture.
"use strict";
(() => {
  const ZERO = 0, NONE = 1, BAD = 2, BELOW = 3, ABOVE = 4, FIRST = 5;  // codes of cells; then numbers
  const RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const make = (name, kind) => Object.assign(document.createElement(name), {className: kind});

  // ---- numbers in words; they are given as powers of ten where they are ratios

  const power = ten => "10" + (ten < 0 ? "⁻" : "") + [...String(Math.abs(ten))].map(n => RAISED[n]).join("");

  function plain(value, digits) {
    const size = Math.abs(value), sign = value < 0 ? "−" : "";
    if (size === 0) return "0";
    if (size >= 1e-3 && size < 1e5) return sign + Number(size.toPrecision(digits));
    return sign + scientific(Math.log10(size), digits);
  }

  function scientific(log10, digits) {
    let ten = Math.floor(log10), front = Number((10 ** (log10 - ten)).toPrecision(digits));
    if (front >= 10) { ten += 1; front /= 10; }
    return front === 1 ? power(ten) : front + "·" + power(ten);
  }

  // a ratio as people say it: 3.1 %, 2·10⁻⁵, 13 times
  function ratio(log10, digits) {
    if (log10 < -3) return scientific(log10, digits);
    if (log10 < Math.log10(2)) return plain(100 * 10 ** log10, digits) + " %";
    return (log10 < 5 ? plain(10 ** log10, digits) : scientific(log10, digits)) + " times";
  }

  const range = (first, more) => more ? `${first}–${first + more}` : String(first);
  const counted = (number, noun) => `${number} ${noun}${number === "1" ? "" : "s"}`;

  // ---- the two kinds of panel: each finds a cell at a place, names it, and marks it

  // cells along one side: where one begins, which one holds a place, what it is called
  function side(cells) {
    const count = cells.first.length, even = cells.edges.length === 2 && count > 1;
    const [start, end] = [cells.edges[0], cells.edges[cells.edges.length - 1]];
    return {
      count,
      edge: place => even ? start + (end - start) * place / count : cells.edges[place],
      at(value) {
        if (even) return Math.floor((value - start) / (end - start) * count);
        let place = 0;
        while (place < count && (value - cells.edges[place + 1]) * Math.sign(end - start) >= 0) place += 1;
        return place;
      },
      name(place) {
        if (cells.names) return cells.names[place];
        const number = range(cells.first[place], cells.more);
        const said = cells.noun ? counted(number, cells.noun) : number;
        return cells.labels && cells.labels[place] ? `${said} “${cells.labels[place]}”` : said;
      },
    };
  }

  function grid(panel) {
    const codes = Uint8Array.from(atob(panel.cells), letter => letter.charCodeAt(0));
    const across = side(panel.across), down = side(panel.down);
    const code = (row, column) => codes[row * across.count + column];
    const log10 = found => panel.low + (found - FIRST) * panel.by;

    // how far apart the steps of a cell are; a range where a cell stands for several
    function apart(row, column) {
      const y = panel.down.first[row], x = panel.across.first[column];
      const ends = [y - x - (panel.across.more || 0), y - x + (panel.down.more || 0)].map(Math.abs);
      const [least, most] = y >= x ? ends : ends.reverse();
      return least === most ? counted(String(least), "step") : `${least}–${most} steps`;
    }

    function say(column, row) {
      const found = code(row, column), words = panel.words;
      let kind = "some", value = "";
      if (found === ZERO) kind = "zero";
      else if (found === NONE) kind = "none";
      else if (found === BAD) kind = "bad";
      else if (found === BELOW) { kind = words.less ? "less" : "some"; value = "less than 10⁻⁸"; }
      else if (found === ABOVE) { kind = "more"; value = "more than 10⁸ times"; }
      else {
        value = ratio(log10(found), 2);
        kind = log10(found) >= Math.log10(2) ? "more" : log10(found) < -2 && words.less ? "less" : "some";
      }
      if (value && words.same && panel.down.first[row] === panel.across.first[column]) kind = "same";
      const parts = {x: across.name(column), y: down.name(row), value, apart: apart(row, column)};
      const said = words[kind].replace(/\{(\w+)\}/g, (_, name) => parts[name]);
      return [said, value && found > ABOVE ? panel.error : ""];
    }

    // the colour of a number, between the colours of every second power of ten from 10⁻⁶ to 10⁶
    function colour(found) {
      if (found === NONE) return [0, 0, 0, 0];
      if (found === ZERO || found === BELOW || found === ABOVE) found = found === ABOVE ? 6 : found === BELOW ? -6 : null;
      else found = Math.max(-6, Math.min(6, log10(found)));
      if (found === null) return [0, 0, 0, 255];
      const place = (found + 6) / 2, low = Math.min(5, Math.floor(place));
      const [from, to] = [low, low + 1].map(n => panel.colours[n].match(/\w\w/g).map(one => parseInt(one, 16)));
      return [...from.map((one, n) => Math.round(one + (to[n] - one) * (place - low))), 255];
    }

    // the whole row, thick enough to be seen: every earlier step by how much of it is left
    function strip(row) {
      const canvas = make("canvas", "strip");
      canvas.width = across.count;
      canvas.height = 1;
      const pen = canvas.getContext("2d"), pixels = pen.createImageData(across.count, 1);
      for (let column = 0; column < across.count; column += 1)
        pixels.data.set(colour(code(row, column)), 4 * column);
      pen.putImageData(pixels, 0, 0);
      return canvas;
    }

    return {
      columns: across.count, rows: down.count,
      start: [across.count - 1, panel.colours ? down.count - 1 : 0],
      at: (x, y) => [across.at(x), down.at(y)],
      say,
      box: (column, row) => [across.edge(column), down.edge(row), across.edge(column + 1), down.edge(row + 1)],
      strip: panel.colours ? row => [strip(row), across.edge(0), across.edge(across.count)] : null,
    };
  }

  function curves(panel) {
    const worded = value => {
      if (value === null) return "none";
      if (value === "0") return "0";
      if (panel.share) return ratio(value, 3);
      return !panel.log10 ? plain(value, 3) : value >= -3 && value < 5 ? plain(10 ** value, 3) : scientific(value, 3);
    };
    return {
      columns: panel.at.length, rows: 1, start: [0, 0],
      at(x) {
        const off = panel.at.map(one => Math.abs(one - x));
        return [off.indexOf(Math.min(...off)), 0];
      },
      say(column) {
        const where = panel.names ? panel.names[column] : plain(panel.at[column], 6);
        const said = panel.lines.map((line, n) =>
          [n ? "" : panel.of, line.name].filter(Boolean).join(", ") + ": " + worded(line.values[column]));
        return [[panel.across, where].filter(Boolean).join(": ") + " — " + said.join("; "), ""];
      },
      box: (column, _, place) => [panel.at[column], place.y[0], panel.at[column], place.y[1]],
      strip: null,
    };
  }

  // ---- one place for words, near the pointer

  const tip = make("div", "tip");
  tip.setAttribute("role", "status");
  tip.hidden = true;
  let shown = null;  // the panel that speaks

  function hide() {
    tip.hidden = true;
    if (shown) shown.replaceChildren();
    shown = null;
  }

  // above what it speaks of where there is room, else below, and never outside the window
  function settle(mark) {
    const at = mark.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const left = Math.max(4, Math.min((at.left + at.right - tip.offsetWidth) / 2, wide - tip.offsetWidth - 4));
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = left + "px";
    tip.style.top = (above > 4 ? above : Math.min(at.bottom + 8, innerHeight - tip.offsetHeight - 4)) + "px";
  }

  // ---- a panel on its picture

  function lay(hot, panel, place) {
    hot.style.left = 100 * place.box[0] + "%";
    hot.style.top = 100 * place.box[1] + "%";
    hot.style.width = 100 * place.box[2] + "%";
    hot.style.height = 100 * place.box[3] + "%";
    hot.place = place;
  }

  function answer(hot, panel) {
    let [column, row] = panel.start;
    const share = (value, [from, to]) => (value - from) / (to - from);

    function show() {
      if (shown && shown !== hot) hide();
      shown = hot;
      const place = hot.place, [x0, y0, x1, y1] = panel.box(column, row, place);
      const left = share(x0, place.x), top = share(y0, place.y);
      const mark = make("div", "mark");
      mark.style.left = 100 * left + "%";
      mark.style.top = 100 * top + "%";
      mark.style.width = `max(3px, ${100 * (share(x1, place.x) - left)}%)`;
      mark.style.height = `max(3px, ${100 * (share(y1, place.y) - top)}%)`;
      hot.replaceChildren(mark);
      if (panel.strip) {
        const [canvas, from, to] = panel.strip(row);
        canvas.style.left = 100 * share(from, place.x) + "%";
        canvas.style.width = 100 * (share(to, place.x) - share(from, place.x)) + "%";
        canvas.style.top = 50 * (top + share(y1, place.y)) + "%";
        hot.prepend(canvas);
      }
      const [said, error] = panel.say(column, row);
      tip.textContent = said;
      if (error) tip.append(Object.assign(make("small", ""), {textContent: error}));
      tip.hidden = false;
      settle(mark);
    }

    function point(event) {
      const box = hot.getBoundingClientRect(), place = hot.place;
      const x = place.x[0] + (event.clientX - box.left) / box.width * (place.x[1] - place.x[0]);
      const y = place.y[0] + (event.clientY - box.top) / box.height * (place.y[1] - place.y[0]);
      const [across, down] = panel.at(x, y);
      column = Math.max(0, Math.min(panel.columns - 1, across));
      row = Math.max(0, Math.min(panel.rows - 1, down));
      show();
    }

    hot.addEventListener("pointermove", event => { if (event.pointerType === "mouse") point(event); });
    hot.addEventListener("pointerdown", point);
    hot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
    hot.addEventListener("focus", () => { if (hot.matches(":focus-visible")) show(); });
    hot.addEventListener("blur", hide);
    hot.addEventListener("keydown", event => {
      const far = event.shiftKey ? 10 : 1;
      const [right, below] = {ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far],
        ArrowDown: [0, far]}[event.key] || [0, 0];
      if (event.key === "Escape") hide();
      if (!right && !below) return;
      event.preventDefault();
      column = Math.max(0, Math.min(panel.columns - 1, column + right));
      row = Math.max(0, Math.min(panel.rows - 1, row + below));
      show();
    });
  }

  function picture(figure) {
    const told = JSON.parse(figure.querySelector("script").textContent);
    const image = figure.querySelector("picture"), source = figure.querySelector("source");
    const name = figure.querySelector("img").alt.split(":")[0];  // "gain-map of rnn.l0"
    const plate = make("div", "plate"), narrow = matchMedia(source ? source.media : "not all");
    image.replaceWith(plate);
    plate.append(image);
    const hots = told.panels.map((panel, n) => {
      const hot = make("div", "hot");
      hot.tabIndex = 0;
      hot.setAttribute("role", "application");
      hot.setAttribute("aria-label", `${name}, panel ${n + 1}: read its numbers with the arrow keys`);
      answer(hot, panel.cells === undefined ? curves(panel) : grid(panel));
      return hot;
    });
    const place = () => hots.forEach((hot, n) =>
      lay(hot, told.panels[n], (narrow.matches && told.narrow || told.places)[n]));
    place();
    narrow.addEventListener("change", () => { hide(); place(); });
    plate.append(...hots);
  }

  addEventListener("DOMContentLoaded", () => {
    const figures = [...document.querySelectorAll("figure")].filter(one => one.querySelector("script"));
    figures.forEach(picture);
    if (!figures.length) return;
    const hint = make("span", "label hint");
    hint.textContent = "point at a picture to read its numbers";
    document.querySelector("h1").append(" ", hint);
    document.body.append(tip);
    const again = () => { if (shown) settle(shown.querySelector(".mark")); };
    addEventListener("scroll", again, true);
    addEventListener("resize", hide);
    document.addEventListener("pointerdown", event => { if (!event.target.closest(".hot")) hide(); });
  });
})();
