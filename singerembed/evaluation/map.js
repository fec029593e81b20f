'use strict';

// A 3-D scatter plot that turns smoothly without a GPU: every point is a small picture, copied into the pixels of a
// 2-D canvas from far to near. With thousands of points that is many times as fast as a drawing call for each, and
// WebGL is nothing that browsers promise where there is no GPU.

// The colours of Okabe and Ito, which the colour-blind tell apart, without yellow, which is lost on white; the last is
// for points that stand back. Neighbours in the order of singers sound alike, and never share a colour.
const INKS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#d8dee4'];
const COLOURS = INKS.length - 1;
const SIGNS = {'●': 'M.9 0A.9.9 0 0 1-.9 0A.9.9 0 0 1 .9 0Z', '▲': 'M0-1L.95.7H-.95Z', '■': 'M-.8-.8H.8V.8H-.8Z'};
const LEVELS = 16, PALEST = 0.35;  // levels of depth: far points are smaller, and paler by as much as this
const EYE = 3;  // the eye's distance from the middle, in radii of the cloud
const TURNS = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1]};
const ZOOMS = {'+': 1.25, '=': 1.25, '-': 0.8};

// `ink` over `under`; pixels are 0xAABBGGRR on little-endian machines, which all that have browsers are.
function blend(ink, under, alpha) {
  const mix = mask => ((ink & mask) * alpha + (under & mask) * (255 - alpha)) / 255 & mask;
  return 0xff000000 | mix(0xff0000) | mix(0xff00) | mix(0xff);
}
const make = (parent, tag, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const colourOf = singer => singer % COLOURS;
const signOf = singer => Math.floor(singer / COLOURS) % Object.keys(SIGNS).length;

class PointMap {
  // points: x, y, z of one after the other, in the unit ball; singer: each one's place in `singers`; crops: its name.
  constructor(element, {points, singer, singers, crops}) {
    Object.assign(this, {points: Float32Array.from(points), singer, singers, crops, n: crops.length});
    Object.assign(this, {yaw: 0.8, pitch: 0.4, zoom: 1, panX: 0, panY: 0, picked: -1});  // angles in radians
    this.styles = singer.map(s => signOf(s) * INKS.length + colourOf(s));  // columns of the stamps
    this.radius = Math.min(6, Math.max(3, 12 / this.n ** 0.15));  // the more points, the smaller
    [this.x, this.y, this.order] = [Float32Array, Float32Array, Uint32Array].map(kind => new kind(this.n));
    this.level = new Uint8Array(this.n);
    this.held = new Map();  // pointers that are down, and where
    this.button = make(element, 'button', {type: 'button', onclick: () => this.turn(!this.turning)});
    const ariaLabel = `Map of ${this.n} points: arrows turn it, plus and minus zoom`;
    this.canvas = make(element, 'canvas', {tabIndex: 0, role: 'application', ariaLabel});
    this.context = this.canvas.getContext('2d', {alpha: false, willReadFrequently: true});  // in memory, not on a GPU
    this.tip = make(element, 'div', {className: 'tip', hidden: true});
    this.addLegend(make(element, 'div', {className: 'legend'}));
    this.listen(this.canvas);
    this.resize();
    this.turn(!matchMedia('(prefers-reduced-motion: reduce)').matches);
  }

  addLegend(legend) {
    this.entries = this.singers.map((name, s) => {
      const entry = make(legend, 'button', {type: 'button', ariaPressed: false, onclick: () => this.pick(s)});
      make(entry, 'span', {textContent: Object.keys(SIGNS)[signOf(s)]}).style.color = INKS[colourOf(s)];
      entry.append(` ${name}`);
      return entry;
    });
  }

  listen(canvas) {
    const on = (name, react) => canvas.addEventListener(name, react, {passive: false});
    on('pointerdown', event => {
      this.turn(false);
      canvas.setPointerCapture(event.pointerId);
      this.held.set(event.pointerId, [event.offsetX, event.offsetY]);
      if (this.held.size === 1) this.travel = 0;
    });
    on('pointermove', event => this.move(event));
    on('pointerup', event => {
      this.held.delete(event.pointerId);
      if (this.held.size || this.travel > 4) return;
      this.pointer = [event.offsetX, event.offsetY];
      this.pick(this.singer[this.find(...this.pointer)] ?? -1);
    });
    on('pointercancel', event => this.held.delete(event.pointerId));
    on('pointerleave', event => {
      if (event.pointerType === 'mouse') this.pointer = null;  // a finger leaves after each tap; the name stays
      this.request();
    });
    on('wheel', event => {
      if (this.zoom === 1 && event.deltaY > 0) return;  // nothing to zoom out of: the page scrolls
      event.preventDefault();
      this.turn(false);
      this.zoomBy(Math.exp(-0.002 * event.deltaY * (event.deltaMode ? 30 : 1)), event.offsetX, event.offsetY);
    });
    on('keydown', event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (TURNS[event.key]) this.turnBy(...TURNS[event.key]);
      else if (ZOOMS[event.key]) this.zoomBy(ZOOMS[event.key], canvas.clientWidth / 2, canvas.clientHeight / 2);
      else if (event.key === 'Escape') this.pick(-1);
      else return;
      event.preventDefault();
      this.turn(false);
    });
    new ResizeObserver(() => this.resize()).observe(canvas);
    addEventListener('resize', () => this.resize());  // the ratio of pixels changes without the canvas's size
    new IntersectionObserver(([{isIntersecting: visible}]) => Object.assign(this, {visible}).request()).observe(canvas);
  }

  move(event) {
    const [x, y] = this.pointer = [event.offsetX, event.offsetY];
    const before = this.held.get(event.pointerId);
    if (before) {
      this.held.set(event.pointerId, this.pointer);
      this.travel += Math.hypot(x - before[0], y - before[1]);
      const other = [...this.held].find(([id]) => id !== event.pointerId)?.[1];
      const apart = place => Math.max(1, Math.hypot(place[0] - other[0], place[1] - other[1]));
      if (other) this.zoomBy(apart(this.pointer) / apart(before), (x + other[0]) / 2, (y + other[1]) / 2);
      else this.turnBy(0.01 * (x - before[0]), 0.01 * (y - before[1]));
    }
    this.request();
  }

  turn(turning) {
    this.turning = turning;
    this.button.textContent = turning ? 'stop turning' : 'turn';
    this.request();
  }

  turnBy(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = Math.max(-Math.PI / 2, Math.min(Math.PI / 2, this.pitch + pitch));
    this.request();
  }

  // Zoom so that what is at (x, y) of the canvas stays there, until all is in sight again.
  zoomBy(factor, x, y) {
    const zoom = Math.max(1, Math.min(40, this.zoom * factor));
    const pan = (at, side, before) => zoom === 1 ? 0 : at - side / 2 - (at - side / 2 - before) * zoom / this.zoom;
    const {clientWidth, clientHeight} = this.canvas;
    Object.assign(this, {panX: pan(x, clientWidth, this.panX), panY: pan(y, clientHeight, this.panY), zoom});
    this.request();
  }

  // Bring one singer's points forward; the same again, or -1, gives all their colours back.
  pick(singer) {
    this.picked = singer === this.picked ? -1 : singer;
    this.entries.forEach((entry, s) => { entry.ariaPressed = s === this.picked; });
    this.request();
  }

  resize() {
    this.ratio = Math.min(2, devicePixelRatio);  // beyond 2 nobody sees it, and it takes as long again
    const {clientWidth, clientHeight} = this.canvas;
    const [width, height] = [clientWidth, clientHeight].map(side => Math.max(1, Math.round(side * this.ratio)));
    Object.assign(this.canvas, {width, height});
    this.image = this.context.createImageData(width, height);
    this.pixels = new Int32Array(this.image.data.buffer);
    this.makeStamps();
    this.draw();  // at once: a canvas that was resized is black
  }

  // Draw every sign in every colour once: a column for each, a row for each level of depth.
  makeStamps() {
    const near = Array.from({length: LEVELS}, (_, level) => level / (LEVELS - 1));
    this.reach = near.map(share => this.ratio * this.radius * (0.55 + 0.45 * share));
    this.size = this.reach.map(r => 2 * Math.ceil(r + this.ratio / 2));
    const cell = this.cell = this.size[LEVELS - 1];
    const paths = Object.values(SIGNS).map(path => new Path2D(path));
    const canvas = new OffscreenCanvas(this.stride = cell * INKS.length * paths.length, cell * LEVELS);
    const context = canvas.getContext('2d', {willReadFrequently: true});
    context.strokeStyle = '#fff';  // parts points that overlap
    near.forEach((share, level) => paths.forEach((path, sign) => INKS.forEach((ink, colour) => {
      const r = this.reach[level];
      context.setTransform(r, 0, 0, r, (sign * INKS.length + colour + 0.5) * cell, (level + 0.5) * cell);
      context.lineWidth = 0.6 * this.ratio / r;
      context.fillStyle = `color-mix(in srgb, ${ink}, #fff ${100 * PALEST * (1 - share)}%)`;
      context.fill(path);
      context.stroke(path);
    })));
    this.stamps = new Int32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  }

  request() {
    this.frame ||= requestAnimationFrame(now => {
      this.frame = 0;
      if (this.turning) this.yaw += 0.3 * Math.min(0.1, (now - (this.last ?? now)) / 1000);  // 0.3 a second
      this.last = now;
      this.draw();
      if (this.turning && this.visible) this.request();
    });
  }

  // Where the points are on the canvas, how near, and in which order to draw them: far to near, the picked ones last.
  project() {
    const {points, x, y, level, order, singer, picked, ratio, canvas, n} = this;
    const [cosYaw, sinYaw, cosPitch, sinPitch] = [this.yaw, this.pitch].flatMap(a => [Math.cos(a), Math.sin(a)]);
    const scale = 0.48 * Math.min(canvas.width, canvas.height) * this.zoom * (EYE - 0.5);
    const middleX = canvas.width / 2 + this.panX * ratio, middleY = canvas.height / 2 + this.panY * ratio;
    const starts = new Uint32Array(2 * LEVELS + 1);
    const bucket = i => level[i] + (singer[i] === picked ? LEVELS : 0);
    for (let i = 0; i < n; i++) {
      const px = points[3 * i], py = points[3 * i + 1], pz = points[3 * i + 2];
      const back = cosYaw * py - sinYaw * px;
      const near = cosPitch * back + sinPitch * pz;
      x[i] = middleX + scale * (cosYaw * px + sinYaw * py) / (EYE - near);
      y[i] = middleY - scale * (cosPitch * pz - sinPitch * back) / (EYE - near);
      level[i] = Math.max(0, Math.min(LEVELS - 1, (near + 1) / 2 * LEVELS));
      starts[bucket(i) + 1]++;
    }
    for (let b = 1; b < starts.length; b++) starts[b] += starts[b - 1];
    for (let i = 0; i < n; i++) order[starts[bucket(i)]++] = i;
  }

  draw() {
    this.project();
    const {x, y, level, order, singer, picked, styles, stamps, stride, cell, size, pixels} = this;
    const {width, height} = this.canvas;
    pixels.fill(-1);  // white
    for (const i of order) {
      const side = size[level[i]], edge = (cell - side) / 2;
      const left = Math.round(x[i]) - side / 2, top = Math.round(y[i]) - side / 2;
      if (left < 0 || top < 0 || left + side > width || top + side > height) continue;
      const style = picked < 0 || singer[i] === picked ? styles[i] : styles[i] | COLOURS;  // the last colour
      let from = (level[i] * cell + edge) * stride + style * cell + edge, to = top * width + left;
      for (let row = 0; row < side; row++, from += stride - side, to += width - side) {
        for (let column = 0; column < side; column++, from++, to++) {
          const ink = stamps[from], alpha = ink >>> 24;
          if (alpha === 255) pixels[to] = ink;
          else if (alpha) pixels[to] = blend(ink, pixels[to], alpha);
        }
      }
    }
    this.context.putImageData(this.image, 0, 0);
    this.showName();
  }

  showName() {
    const i = this.pointer && !this.held.size ? this.find(...this.pointer) : -1;
    this.tip.hidden = i < 0;
    if (i < 0) return;
    const {context, ratio, canvas, tip} = this, x = this.x[i] / ratio, y = this.y[i] / ratio;
    context.lineWidth = 1.5 * ratio;
    context.beginPath();
    context.arc(this.x[i], this.y[i], this.reach[this.level[i]] + 2 * ratio, 0, 7);
    context.stroke();
    tip.textContent = `${this.singers[this.singer[i]]}\n${this.crops[i]}`;
    const right = x > canvas.clientWidth / 2;
    tip.style.transform = `translate(${x + (right ? -10 : 10)}px, ${y + 10}px) translateX(${right ? -100 : 0}%)`;
  }

  // The point at (x, y) of the canvas: the uppermost that covers the place, or the nearest within 6 pixels, or -1.
  find(x, y) {
    let best = -1, least = (6 * this.ratio) ** 2;
    for (let k = this.n - 1; k >= 0; k--) {
      const i = this.order[k];
      const distance = (this.x[i] - x * this.ratio) ** 2 + (this.y[i] - y * this.ratio) ** 2;
      if (distance <= this.reach[this.level[i]] ** 2) return i;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }
}
