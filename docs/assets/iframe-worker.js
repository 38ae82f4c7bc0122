/* Search in pages opened from the disk, where browsers start no worker: a hidden frame runs the worker's script instead.
   mkdocs.yml names it in the place of the shim that the theme's offline plugin would fetch. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => this.load(each)), Promise.resolve())
      this.load(url).then(() => {
        for (const data of this.waiting) this.send(data)
        this.waiting = undefined
      })
    }
    load(url) {
      const page = this.inside.document
      return new Promise((done, failed) => {
        const script = page.createElement("script")
        Object.assign(script, { src: new URL(url, location.href), onload: done, onerror: failed })
        page.head.append(script)
      })
    }
    send(data) {
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.send(data)
    }
    terminate() {
      this.inside.frameElement.remove()
    }
  }
