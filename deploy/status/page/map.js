// Every group's pool, a cell a block: canvases painted from two-bit cells, one cursor for pointer and keyboard.
// What one cell stands for is written in deploy/status/maps.py.

import { count, joined, percent, startWords } from "./words.js";

const WORDS = ["free", "held by one sequence", "shared by several sequences", "cached"];
const GOLDEN = (Math.sqrt(5) - 1) / 2;
const LARGEST_CELL = 18;
const GAP = 20; // between tiles, at most

/** The least width of a tile, and its height as a part of its width, for so many groups on so much room. */
function tileShape(groups, room) {
  const [least, height] =
    groups <= 1 ? [room, 0.24] : groups <= 4 ? [340, 0.55] : groups <= 12 ? [250, 0.8] : groups <= 24 ? [180, 0.8] : [112, 0.9];
  return room < 600 ? [Math.min(least, groups <= 2 ? room : groups <= 24 ? 140 : 96), 0.9] : [least, height];
}

function unpack(text, cells) {
  const bytes = atob(text);
  const states = new Uint8Array(cells);
  for (let cell = 0; cell < cells; cell++) states[cell] = (bytes.charCodeAt(cell >> 2) >> (2 * (cell & 3))) & 3;
  return states;
}

class Tile {
  constructor(maps, group) {
    this.maps = maps;
    this.group = group;
    this.states = new Uint8Array(0);
    this.cell = 0;
    this.columns = 1;
    this.root = document.createElement("div");
    this.root.className = "tile";
    this.root.innerHTML = `<p class="tile-head"><b></b><span><span></span><i> in use</i></span></p>
      <div class="pool" role="slider" aria-orientation="horizontal" aria-roledescription="block map"
        tabindex="-1"><canvas></canvas><i class="cursor" hidden></i></div>`;
    [this.name, this.note, this.unit] = this.root.querySelectorAll(".tile-head :is(b, span span, i)");
    this.pool = this.root.querySelector(".pool");
    this.canvas = this.root.querySelector("canvas");
    this.cursor = this.root.querySelector(".cursor");
    this.name.textContent = `Group ${group}`;
    this.listen();
  }

  listen() {
    this.pool.addEventListener("pointermove", (event) => this.point(event));
    this.pool.addEventListener("pointerleave", () => this.maps.leave(this));
    this.pool.addEventListener("pointerdown", (event) => {
      this.point(event);
      this.maps.enter(this);
    });
    this.pool.addEventListener("focus", () => this.show());
    this.pool.addEventListener("blur", () => this.maps.leave(this));
    this.pool.addEventListener("keydown", (event) => this.key(event));
  }

  /** Takes one group of the document. start: of a group that is coming up. */
  update(line, blocksPerCell, start) {
    const used = line.held + line.shared;
    this.line = line;
    this.blocksPerCell = blocksPerCell;
    this.root.dataset.state = line.state;
    const down = start ? startWords(start) : "down";
    const share = joined(percent(line.total ? used / line.total : 0));
    this.note.textContent = line.state === "up" ? share : line.state === "draining" ? `draining, ${share}` : down;
    this.unit.hidden = line.state === "down";
    this.states = line.map ? unpack(line.map, Math.ceil(line.total / blocksPerCell)) : new Uint8Array(0);
    this.cell = Math.max(0, Math.min(this.cell, this.states.length - 1));
    const kinds = [`${count(line.held)} held`, `${count(line.shared)} shared`, `${count(line.cached)} cached`, `${count(line.free)} free`];
    this.pool.setAttribute(
      "aria-label",
      line.state === "down" ? `Group ${line.group}: ${down}` : `Group ${line.group}: ${count(line.total)} blocks, ${kinds.join(", ")}`,
    );
    this.pool.setAttribute("aria-valuemin", "0");
    this.pool.setAttribute("aria-valuemax", String(Math.max(0, line.total - 1)));
    this.say();
  }

  /** Cell size in device pixels, the same for every tile; paints the canvas. */
  paint(size, width, colours, ratio) {
    const columns = Math.max(1, Math.min(this.states.length, Math.floor(width / size)));
    const rows = Math.ceil(this.states.length / columns);
    const gap = size >= 10 ? 2 : size >= 3 ? 1 : 0;
    Object.assign(this, { columns, size, ratio });
    const [across, down] = [columns * size, rows * size];
    if (this.canvas.width !== across || this.canvas.height !== down) {
      Object.assign(this.canvas, { width: across, height: down });
      this.canvas.style.width = `${across / ratio}px`;
      this.canvas.style.height = `${down / ratio}px`;
    }
    if (!this.states.length) return;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(across, down);
    const pixels = new Uint32Array(image.data.buffer);
    for (let row = 0; row < rows; row++) {
      const top = row * size * across;
      for (let column = 0; column < columns; column++) {
        const cell = row * columns + column;
        if (cell >= this.states.length) break;
        pixels.fill(colours[this.states[cell]], top + column * size, top + (column + 1) * size - gap);
      }
      for (let line = 1; line < size - gap; line++) pixels.copyWithin(top + line * across, top, top + across);
    }
    context.putImageData(image, 0, 0);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((at) => Math.floor((at * this.ratio) / this.size));
    const cell = y * this.columns + x;
    if (x < 0 || x >= this.columns || y < 0 || cell >= this.states.length) return this.maps.leave(this);
    this.cell = cell;
    this.show();
  }

  /** Arrows move by a block or a row; Home and End to the ends; Page Up and Page Down change the group. */
  key(event) {
    const last = this.states.length - 1;
    const moves = {
      ArrowLeft: this.cell - 1,
      ArrowRight: this.cell + 1,
      ArrowUp: this.cell - this.columns,
      ArrowDown: this.cell + this.columns,
      Home: 0,
      End: last,
    };
    if (event.key === "PageUp" || event.key === "PageDown") this.maps.step(this, event.key === "PageUp" ? -1 : 1);
    else if (event.key === "Escape") this.maps.leave(this);
    else if (!(event.key in moves)) return;
    else if (moves[event.key] >= 0 && moves[event.key] <= last) this.cell = moves[event.key];
    event.preventDefault();
    if (event.key in moves) this.show();
  }

  /** Cursor and tip at this cell. */
  show() {
    if (!this.states.length) return;
    const size = this.size / this.ratio;
    const [x, y] = [(this.cell % this.columns) * size, Math.floor(this.cell / this.columns) * size];
    Object.assign(this.cursor.style, { left: `${x}px`, top: `${y}px`, width: `${size}px`, height: `${size}px` });
    this.cursor.hidden = false;
    this.say();
    this.maps.tell(this, x + size / 2, y);
  }

  /** First block of the cell, the block whose state it shows, and its last block. */
  blocks() {
    const [per, total] = [this.blocksPerCell, this.line.total];
    const first = this.cell * per;
    return [first, Math.min(first + Math.floor(((this.cell * GOLDEN) % 1) * per), total - 1), Math.min(first + per, total) - 1];
  }

  words() {
    if (!this.states.length) return "no blocks";
    const [first, shown, last] = this.blocks();
    const state = `block ${count(shown)}, ${WORDS[this.states[this.cell]]}`;
    return first === last ? state : `${state}; stands for blocks ${count(first)} to ${count(last)}`;
  }

  say() {
    const text = this.words();
    this.pool.setAttribute("aria-valuenow", String(this.states.length ? this.blocks()[1] : 0));
    if (this.pool.getAttribute("aria-valuetext") !== text) this.pool.setAttribute("aria-valuetext", text);
  }
}

export class PoolMaps {
  /** swatches: one element a state, in order, whose background is its colour. */
  constructor(root, tip, swatches) {
    Object.assign(this, { root, tip, swatches });
    this.tiles = new Map();
    this.shown = null;
    new ResizeObserver(() => this.paint()).observe(root);
  }

  /** Takes the document. */
  update({ groups: lines, blocks_per_cell: blocksPerCell, starting }) {
    const names = lines.map((line) => line.group).join();
    if (names !== this.names) this.arrange(lines, names);
    const starts = new Map(starting.map((start) => [start.group, start]));
    for (const line of lines) this.tiles.get(line.group).update(line, blocksPerCell, starts.get(line.group));
    this.paint();
    if (this.shown) this.shown.show();
  }

  /** New tiles for new groups; the others stay, so that focus does. */
  arrange(lines, names) {
    this.names = names;
    const tiles = lines.map((line) => this.tiles.get(line.group) ?? new Tile(this, line.group));
    this.tiles = new Map(tiles.map((tile) => [tile.group, tile]));
    this.root.replaceChildren(...tiles.map((tile) => tile.root));
    if (tiles.length && !tiles.some((tile) => tile.pool.tabIndex === 0)) tiles[0].pool.tabIndex = 0;
  }

  /** Cells are as large as the fullest tile allows, in whole device pixels, so that all maps compare. */
  paint() {
    const tiles = [...this.tiles.values()];
    if (!tiles.length) return;
    const ratio = window.devicePixelRatio || 1;
    const [least, shape] = tileShape(tiles.length, this.root.clientWidth);
    const rows = Math.ceil(tiles.length / Math.max(1, Math.floor((this.root.clientWidth + GAP) / (least + GAP))));
    this.root.style.setProperty("--columns", String(Math.ceil(tiles.length / rows))); // as few rows, evenly filled
    const width = Math.floor(tiles[0].root.clientWidth * ratio);
    const most = Math.max(1, ...tiles.map((tile) => tile.states.length));
    const fitting = Math.round(width * Math.sqrt(shape / most));
    const size = Math.max(1, Math.min(fitting, Math.round(LARGEST_CELL * ratio)));
    const colours = this.swatches.map(packedColour);
    for (const tile of tiles) tile.paint(size, width, colours, ratio);
  }

  tell(tile, x, y) {
    if (this.shown && this.shown !== tile) this.shown.cursor.hidden = true;
    this.shown = tile;
    const words = tile.words();
    this.tip.textContent = `Group ${tile.group}: ${words}`;
    this.tip.hidden = false;
    const [pool, frame] = [tile.pool.getBoundingClientRect(), this.root.getBoundingClientRect()];
    const left = pool.left - frame.left + x - this.tip.offsetWidth / 2;
    this.tip.style.left = `${Math.max(0, Math.min(left, frame.width - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${pool.top - frame.top + y - this.tip.offsetHeight - 6}px`;
  }

  leave(tile) {
    if (this.shown !== tile) return;
    tile.cursor.hidden = true;
    this.tip.hidden = true;
    this.shown = null;
  }

  /** One tab stop for all maps: the tile that was used last. */
  enter(tile) {
    for (const other of this.tiles.values()) other.pool.tabIndex = other === tile ? 0 : -1;
    tile.pool.focus({ preventScroll: false });
  }

  step(tile, by) {
    const tiles = [...this.tiles.values()];
    const next = tiles[tiles.indexOf(tile) + by];
    if (next) this.enter(next);
  }
}

/** A colour as one little-endian RGBA pixel. */
function packedColour(swatch) {
  const [red, green, blue] = getComputedStyle(swatch).backgroundColor.match(/[\d.]+/g).map(Number);
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
